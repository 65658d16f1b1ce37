"""What estimators ask a model."""
