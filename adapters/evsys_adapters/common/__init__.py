"""What most adapters need: arguments of hooks, validated parameters, plain values, lines on a terminal."""
