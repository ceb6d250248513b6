"""What reward functions pay, tried before a run: `probes` for completions without work, `tries` for right answers in
honest dresses and for wrong ones that look like them."""
