//! The specification's cases under their names, a model, and what the specification leaves open.

mod cases;
mod model;
mod own;
mod shadow;
