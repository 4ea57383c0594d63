//! Where identities come from.

use uuid::Uuid;

/// A number from 0 to 1, by chance.
pub(crate) fn fraction() -> f64 {
    // Any 32 random bits of it; the version's are elsewhere.
    f64::from(uuid().as_fields().0) / f64::from(u32::MAX)
}

/// A new identity: random.
pub(crate) fn uuid() -> Uuid {
    #[cfg(feature = "simulation")]
    if let Some(bytes) = crate::simulation::random_bytes() {
        return uuid::Builder::from_random_bytes(bytes).into_uuid();
    }
    Uuid::new_v4()
}
