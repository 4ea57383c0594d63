//! The specification's cases under their names, a model, and what the specification leaves open.

mod cases;
mod crash;
mod history;
mod in_flight;
mod kill;
mod model;
mod own;
mod shadow;
