"""``fimo search``: an estimator's hyper-parameters and further training, tried on Ray Tune."""
