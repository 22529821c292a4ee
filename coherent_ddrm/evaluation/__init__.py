"""One command that scores everything alike: pictures and holes, methods, scores, statistics, report."""
