//! What is saved of a configuration space: a part of its function's own record.

use serde::{Deserialize, Serialize};
use wardian_state::check::{Wrong, ensure};

use super::ConfigSpace;

/// A register that software can write, at least in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigRegisterState {
    /// Offset, a multiple of 4.
    pub offset: u16,
    /// All of its 32 bits.
    pub value: u32,
}

/// A configuration space as it is saved: who the function is, and the registers that software can write. Its BARs
/// decode again by themselves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Registers, by offset.
    pub registers: Vec<ConfigRegisterState>,
}

impl ConfigSpace {
    /// Offset and writable bits of every register that has such.
    fn writable_registers(&self) -> impl Iterator<Item = (usize, u32)> {
        let mask = |bytes: &[u8]| bytes.iter().rev().fold(0u32, |mask, byte| mask << 8 | u32::from(*byte));
        let registers = self.writable.chunks(4).map(mask).enumerate();
        registers.map(|(number, mask)| (4 * number, mask)).filter(|register| register.1 != 0)
    }

    /// What to save.
    #[must_use]
    pub fn save(&self) -> ConfigState {
        let register = |(offset, _): (usize, u32)| ConfigRegisterState {
            offset: offset as u16,
            value: self.dword(offset),
        };
        ConfigState {
            vendor: self.word(0),
            device: self.word(2),
            registers: self.writable_registers().map(register).collect(),
        }
    }

    /// This space, as its function makes it, with what software had written when `state` was saved.
    ///
    /// # Errors
    /// When it was saved of another function, or has bits that software cannot write.
    pub fn restore(mut self, state: &ConfigState) -> Result<ConfigSpace, Wrong> {
        let own = (self.word(0), self.word(2));
        let other = |is: u16, own: u16| format!("{is:#06x}, where the function is {own:#06x}");
        ensure(state.vendor == own.0, "vendor", || other(state.vendor, own.0))?;
        ensure(state.device == own.1, "device", || other(state.device, own.1))?;
        let known: Vec<(usize, u32)> = self.writable_registers().collect();
        let same =
            known.iter().map(|register| register.0).eq(state.registers.iter().map(|r| usize::from(r.offset)));
        ensure(same, "registers", || "the function has others")?;
        for ((offset, mask), register) in known.into_iter().zip(&state.registers) {
            let odd = (register.value ^ self.dword(offset)) & !mask;
            ensure(odd == 0, "registers", || {
                format!("bits {odd:#x} at {offset:#x} cannot be written, and the function has them otherwise")
            })?;
            self.set(offset, &register.value.to_le_bytes());
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::ConfigState;
    use crate::pci::{ConfigSpace, Identity};

    fn fresh() -> ConfigSpace {
        let mut space = ConfigSpace::new(&Identity { vendor: 0x1af4, device: 0x1042, ..Identity::default() });
        space.add_bar64(0, 0x8000, false).unwrap();
        space.add_capability(0x09, &[1, 2, 3], &[0, 0xf0, 0]).unwrap();
        space
    }

    #[test]
    fn a_restored_space_is_the_same_to_software() {
        let mut random = 1u64;
        for _ in 0..200 {
            let mut one = fresh();
            for _ in 0..40 {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                one.write((random >> 33) as usize % 0x50, &(random >> 20).to_le_bytes()[..4]);
            }
            let state = one.save();
            let text = serde_json::to_string(&state).unwrap();
            let two = fresh().restore(&serde_json::from_str(&text).unwrap()).unwrap();
            let (mut a, mut b) = ([0; 4096], [0; 4096]);
            one.read(0, &mut a);
            two.read(0, &mut b);
            assert_eq!(a, b);
            assert_eq!((two.mapped_bars(), two.save()), (one.mapped_bars(), state));
        }
    }

    #[test]
    fn a_space_of_another_function_is_refused() {
        let state = fresh().save();
        let refused = |change: &dyn Fn(&mut ConfigState)| {
            let mut state = state.clone();
            change(&mut state);
            fresh().restore(&state).map(drop).map_err(|e| e.field().to_owned())
        };
        assert_eq!(refused(&|_| ()), Ok(()));
        assert_eq!(refused(&|s| s.vendor = 1), Err("vendor".to_owned()));
        assert_eq!(refused(&|s| s.device = 1), Err("device".to_owned()));
        assert_eq!(refused(&|s| s.registers.truncate(1)), Err("registers".to_owned()));
        assert_eq!(refused(&|s| s.registers[0].offset = 3), Err("registers".to_owned()));
        assert_eq!(refused(&|s| s.registers[0].value ^= 1), Err("registers".to_owned()));
    }
}
