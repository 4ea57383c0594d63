//! Sets of bits.

use std::fmt;

// A newtype, its known bits, and the operations on sets that are needed.
macro_rules! bits {
    ($(#[$doc:meta])* $name:ident($int:ty) { $($(#[$vdoc:meta])* $value:ident = $number:expr;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name(pub $int);

        impl $name {
            $($(#[$vdoc])* pub const $value: Self = Self($number);)*
            /// No bit set.
            pub const NONE: Self = Self(0);

            /// Every bit of `other` is set.
            #[must_use]
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// The bits of either.
            #[must_use]
            pub const fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// The bits of `other` if `condition` holds, too.
            #[must_use]
            pub const fn with_if(self, condition: bool, other: Self) -> Self {
                if condition { self.with(other) } else { self }
            }

            /// The bits that are not in `other`.
            #[must_use]
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }

            /// No bit is set.
            #[must_use]
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut rest = *self;
                let mut separator = "";
                f.write_str("{")?;
                $(if rest.contains(Self::$value) {
                    write!(f, "{separator}{}", stringify!($value))?;
                    rest = rest.without(Self::$value);
                    separator = " ";
                })*
                if !rest.is_empty() {
                    write!(f, "{separator}{:#x}", rest.0)?;
                }
                f.write_str("}")
            }
        }
    };
}

bits! {
    /// What the server offers in its greeting (§2).
    HandshakeFlags(u16) {
        /// Options can be refused without ending the connection.
        FIXED_NEWSTYLE = 1 << 0;
        /// The padding after `EXPORT_NAME` can be left out.
        NO_ZEROES = 1 << 1;
    }
}

bits! {
    /// What the client accepts of the greeting (§2).
    ClientFlags(u32) {
        /// Options can be refused without ending the connection.
        FIXED_NEWSTYLE = 1 << 0;
        /// The padding after `EXPORT_NAME` is left out.
        NO_ZEROES = 1 << 1;
    }
}

bits! {
    /// What an export can do (§3).
    TransmissionFlags(u16) {
        /// Always set.
        HAS_FLAGS = 1 << 0;
        /// No command that changes content is accepted.
        READ_ONLY = 1 << 1;
        /// `FLUSH` is there.
        SEND_FLUSH = 1 << 2;
        /// The `FUA` flag is there.
        SEND_FUA = 1 << 3;
        /// A disk that turns.
        ROTATIONAL = 1 << 4;
        /// `TRIM` is there.
        SEND_TRIM = 1 << 5;
        /// `WRITE_ZEROES`, and its flag `NO_HOLE`, are there.
        SEND_WRITE_ZEROES = 1 << 6;
        /// The flag `DF` of reads is there.
        SEND_DF = 1 << 7;
        /// A flush on one connection covers writes completed on all.
        CAN_MULTI_CONN = 1 << 8;
        /// Experimental.
        SEND_RESIZE = 1 << 9;
        /// `CACHE` is there.
        SEND_CACHE = 1 << 10;
        /// The flag `FAST_ZERO` of `WRITE_ZEROES` is there.
        SEND_FAST_ZERO = 1 << 11;
        /// `BLOCK_STATUS` takes a payload (extended headers only).
        BLOCK_STATUS_PAYLOAD = 1 << 12;
    }
}

bits! {
    /// Modifiers of a command (§4).
    CommandFlags(u16) {
        /// Reply only when the data are on stable storage.
        FUA = 1 << 0;
        /// The area of a `WRITE_ZEROES` must be allocated.
        NO_HOLE = 1 << 1;
        /// At most one content chunk.
        DF = 1 << 2;
        /// Exactly one extent, not longer than the request.
        REQ_ONE = 1 << 3;
        /// Fail at once if zeroing is not faster than writing.
        FAST_ZERO = 1 << 4;
        /// The length is that of the payload (extended headers only).
        PAYLOAD_LEN = 1 << 5;
    }
}

bits! {
    /// Modifiers of a structured or extended reply chunk (§5).
    ChunkFlags(u16) {
        /// The last chunk of its reply.
        DONE = 1 << 0;
    }
}

bits! {
    /// The state of an extent in the context `base:allocation` (§7).
    AllocationFlags(u32) {
        /// Occupies no space.
        HOLE = 1 << 0;
        /// Reads as zeroes.
        ZERO = 1 << 1;
    }
}
