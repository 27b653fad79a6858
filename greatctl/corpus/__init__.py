"""Words: where texts are, how their bytes are read, and what is cut from them and why."""
