"""What hears of a step: the metrics file, callbacks, trackers, the summary; and the speed that they tell."""
