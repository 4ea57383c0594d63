//! `brep nbd`: one image as an export, what a server offers, and copies.
pub(crate) mod copy;
pub(crate) mod info;
pub(crate) mod list;
mod map;
pub(crate) mod resize;
pub(crate) mod serve;
