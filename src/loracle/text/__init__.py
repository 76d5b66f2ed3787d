"""From a text to the rows of a packed batch: template, encode, packing. No torch here."""
