"""The figures of the documentation's concepts, each computed by the code that it explains."""
