"""Classification: k-NN, linear, logistic, fine-tuning and nearest neighbors."""
