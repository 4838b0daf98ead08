"""The model as it is given: files, graph, shapes, atoms and example inputs."""
