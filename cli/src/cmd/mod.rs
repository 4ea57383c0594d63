//! What the commands do.
pub(crate) mod control;
pub(crate) mod demo;
pub(crate) mod events;
pub(crate) mod image;
pub(crate) mod nbd;
pub(crate) mod pair;
pub(crate) mod runtime;
pub(crate) mod status;
pub(crate) mod tls;
