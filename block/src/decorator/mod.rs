//! Devices that change how another one behaves, and nothing of what it stores.

mod count;
mod fault;
mod part;
mod power;
mod read_only;
mod serialise;

pub use self::count::{Count, Counts};
pub use self::fault::{Fault, Hang, Rule, Times};
pub use self::part::Part;
pub use self::power::{Power, PowerCut, PowerLoss};
pub use self::read_only::ReadOnly;
pub use self::serialise::Serialise;
