"""``echokv demo``: a real server, real requests, and what each mode costs."""
