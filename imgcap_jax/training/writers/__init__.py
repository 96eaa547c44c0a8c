"""Services that show the metrics of runs: TensorBoard, Weights & Biases, Trackio, MLflow, or one of your own."""
