"""One file for each runtime; every class is an `ofa.export.runtime.Runtime`."""
