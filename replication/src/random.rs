//! Where identities come from.

use uuid::Uuid;

/// A new identity: random.
pub(crate) fn uuid() -> Uuid {
    #[cfg(feature = "simulation")]
    if let Some(bytes) = crate::simulation::random_bytes() {
        return uuid::Builder::from_random_bytes(bytes).into_uuid();
    }
    Uuid::new_v4()
}
