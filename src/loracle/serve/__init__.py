"""From requests to answers: a bounded queue in front of the models, and HTTP in front of the queue."""
