"""Softmax runs in base 2, which is what a GPU exponentiates in: the factors there and back."""

LOG2E = 1.4426950408889634  # of a score; where there is a scale, the host folds it in
LN2 = 0.6931471805599453  # of a log-sum-exp
