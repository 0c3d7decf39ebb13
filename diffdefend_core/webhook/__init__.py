"""A receiver for MLflow's registry events: `deliveries` verifies one, `queue` works, `app` is the HTTP around them."""
