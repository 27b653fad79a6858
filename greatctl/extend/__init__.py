"""What can be added without touching greatctl: sources, architectures, metrics, report sections, observers.

`contracts` says what each added thing must be, `hookspecs` where a plugin hands it over, `registry` who gave
what, `loading` and `manager` how plugins come in one by one without harming the run, `testing` how an author
proves one right.
"""
