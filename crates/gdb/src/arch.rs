//! The x86-64 processor as `gdbstub` wants it described.

use std::num::NonZeroUsize;

use gdbstub::arch::{Arch, RegId, Registers};
use wardian_cpu::CpuState;

use crate::registers;

/// A register by its number in the target description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Register(pub(crate) usize);

impl RegId for Register {
    fn from_raw_id(id: usize) -> Option<(Register, Option<NonZeroUsize>)> {
        Some((Register(id), NonZeroUsize::new(registers::size(id)?)))
    }
}

/// All registers, in wire order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block(Vec<u8>);

impl Default for Block {
    fn default() -> Block {
        Block(vec![0; registers::offset(registers::COUNT)])
    }
}

impl Block {
    pub(crate) fn load(&mut self, state: &CpuState) {
        let mut at = 0;
        for number in 0..registers::COUNT {
            at += registers::read(state, number, &mut self.0[at..]);
        }
    }

    /// Puts every register into `state`; `None` if one cannot be.
    pub(crate) fn store(&self, state: &mut CpuState) -> Option<()> {
        let mut at = 0;
        for number in 0..registers::COUNT {
            registers::write(state, number, self.0.get(at..)?)?;
            at += registers::size(number)?;
        }
        Some(())
    }
}

impl Registers for Block {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        let at = registers::offset(registers::RIP);
        let mut rip = [0; 8];
        rip.copy_from_slice(&self.0[at..at + 8]);
        u64::from_le_bytes(rip)
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        for byte in &self.0 {
            write_byte(Some(*byte));
        }
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        if bytes.len() != self.0.len() {
            return Err(());
        }
        self.0.copy_from_slice(bytes);
        Ok(())
    }
}

/// The architecture.
pub(crate) enum X86 {}

impl Arch for X86 {
    type Usize = u64;
    type Registers = Block;
    type BreakpointKind = usize;
    type RegId = Register;

    fn target_description_xml() -> Option<&'static str> {
        Some(registers::XML)
    }
}
