"""The object store, the stage folders in it, and the MLflow server: everything that leaves the process."""
