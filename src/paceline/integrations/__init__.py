"""paceline inside other libraries' loops: one module a host, which needs that host installed."""
