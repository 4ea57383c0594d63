//! The specification's cases under their names, a model, and what the specification leaves open.

mod cases;
mod crash;
mod grow;
mod history;
mod in_flight;
mod kill;
mod log;
mod model;
mod own;
mod power;
mod shadow;
