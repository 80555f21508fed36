"""A network behind HTTP: images in, classes out; batched, limited, measured."""
