"""What `script/bench` measures: one function a row, on guests and data of its own."""
