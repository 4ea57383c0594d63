//! The `brep` program.
fn main() {}
