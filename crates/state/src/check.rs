//! Checking a saved state where it enters: a field that cannot be, named.

use std::fmt;

use crate::{Record, Refused};

/// A field of a saved state that has no possible value, or none that goes with the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    field: String,
    why: String,
}

impl Wrong {
    /// `field` is wrong, because of `why`.
    #[must_use]
    pub fn new(field: impl Into<String>, why: impl fmt::Display) -> Wrong {
        Wrong { field: field.into(), why: why.to_string() }
    }

    /// The field, with the names of what it is in.
    #[must_use]
    pub fn field(&self) -> &str {
        &self.field
    }

    /// The same field, as one of `outer`.
    #[must_use]
    pub fn within(self, outer: impl fmt::Display) -> Wrong {
        Wrong { field: format!("{outer}.{}", self.field), why: self.why }
    }

    /// The refusal of the `R` that it is in.
    #[must_use]
    pub fn in_record<R: Record>(self) -> Refused {
        Refused::new::<R>(self.to_string())
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.why)
    }
}

impl std::error::Error for Wrong {}

/// `field` is wrong unless `right`; `why` says why.
///
/// # Errors
/// When it is.
pub fn ensure<W: fmt::Display>(right: bool, field: &str, why: impl FnOnce() -> W) -> Result<(), Wrong> {
    if right { Ok(()) } else { Err(Wrong::new(field, why())) }
}

/// `field` is wrong if its `value` has bits that are not in `mask`.
///
/// # Errors
/// When it has.
pub fn only_bits(field: &str, value: impl Into<u64>, mask: impl Into<u64>) -> Result<(), Wrong> {
    let odd = value.into() & !mask.into();
    ensure(odd == 0, field, || format!("bits {odd:#x} cannot be set"))
}

/// `field` is wrong if its `value` is above `most`.
///
/// # Errors
/// When it is.
pub fn at_most(field: &str, value: impl Into<u64>, most: impl Into<u64>) -> Result<(), Wrong> {
    let (value, most) = (value.into(), most.into());
    ensure(value <= most, field, || format!("{value} is more than {most}"))
}

#[cfg(test)]
mod tests {
    use super::{Wrong, at_most, ensure, only_bits};

    #[test]
    fn a_field_is_named_with_all_that_it_is_in() {
        let wrong = at_most("count", 3u8, 2u8).unwrap_err().within("tick").within("timers[1]");
        assert_eq!(wrong.to_string(), "timers[1].tick.count: 3 is more than 2");
        assert_eq!(
            only_bits("mask", 0x15u16, 5u16).unwrap_err().to_string(),
            "mask: bits 0x10 cannot be set"
        );
        assert_eq!(only_bits("mask", 5u16, 5u16), Ok(()));
        assert_eq!(ensure(false, "a", || "b"), Err(Wrong::new("a", "b")));
    }
}
