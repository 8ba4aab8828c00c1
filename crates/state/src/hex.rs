//! Bytes as hexadecimal digits: `#[serde(with = "wardian_state::hex")]` on a `Vec<u8>` or a `[u8; N]`.

use std::borrow::Cow;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serializer};

/// Writes them.
///
/// # Errors
/// The serializer's.
pub fn serialize<S: Serializer, T: AsRef<[u8]>>(bytes: &T, serializer: S) -> Result<S::Ok, S::Error> {
    let digit = |nibble: u8| char::from(b"0123456789abcdef"[usize::from(nibble & 15)]);
    let text: String = bytes.as_ref().iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect();
    serializer.serialize_str(&text)
}

/// Reads them.
///
/// # Errors
/// What is not an even number of lower-case digits, or not as many bytes as fit.
pub fn deserialize<'de, D: Deserializer<'de>, T: TryFrom<Vec<u8>>>(deserializer: D) -> Result<T, D::Error> {
    let text = Cow::<str>::deserialize(deserializer)?;
    let nibble = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let pairs = text.as_bytes().chunks(2);
    let bytes: Option<Vec<u8>> = pairs
        .map(|pair| match pair {
            [high, low] => Some(nibble(*high)? << 4 | nibble(*low)?),
            _ => None,
        })
        .collect();
    let bytes = bytes.ok_or_else(|| D::Error::custom("bytes are pairs of hexadecimal digits"))?;
    let count = bytes.len();
    T::try_from(bytes).map_err(|_| D::Error::custom(format!("{count} bytes do not fit")))
}
