"""What scores are worth: metrics, intervals, calibration, significance."""
