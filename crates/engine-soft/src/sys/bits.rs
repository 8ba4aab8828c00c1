//! BT, BTS, BTR and BTC on memory. With a bit offset in a register the address depends on it (Intel SDM vol. 2A,
//! BT; vol. 1, 3.1.1.9 "bit strings").

use iced_x86::{Instruction, Mnemonic, OpKind};
use wardian_cpu::bits::rflags::CF;

use super::advance;
use super::legacy::locked::update;
use super::legacy::operand::{load, register, sign_extend};
use crate::access::{address_size, segment_number, size_mask};
use crate::core::Core;
use crate::trap::Result;

/// Runs `insn` if it is one of this module's.
pub(crate) fn interpret(core: &mut Core, insn: &Instruction) -> Option<Result<()>> {
    let mnemonic = insn.mnemonic();
    let mine = matches!(mnemonic, Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    (mine && insn.op0_kind() == OpKind::Memory).then(|| run(core, insn, mnemonic))
}

fn run(core: &mut Core, insn: &Instruction, mnemonic: Mnemonic) -> Result<()> {
    let size = insn.memory_size().size();
    let bits = 8 * size as u64;
    let mut offset = core.operand_offset(insn);
    let bit = if insn.op1_kind() == OpKind::Register {
        let bit = sign_extend(register(core, insn.op1_register()), size);
        let units = (bit as i64).div_euclid(bits as i64);
        offset = offset.wrapping_add((units as u64).wrapping_mul(size as u64))
            & size_mask(address_size(insn, core.is_64bit()));
        bit & (bits - 1)
    } else {
        u64::from(insn.immediate8()) & (bits - 1)
    };
    let write = mnemonic != Mnemonic::Bt;
    let linear = core.linear(segment_number(insn.memory_segment()), offset, size, write)?;
    let mask = 1u64 << bit;
    let old = match mnemonic {
        Mnemonic::Bts => update(core, linear, size, |old| old | mask)?,
        Mnemonic::Btr => update(core, linear, size, |old| old & !mask)?,
        Mnemonic::Btc => update(core, linear, size, |old| old ^ mask)?,
        _ => load(core, linear, size)?,
    };
    // The other arithmetic flags are undefined but ZF, which stays; processors leave them all.
    let flags = core.rflags() & !CF;
    core.set_rflags(if old & mask != 0 { flags | CF } else { flags });
    advance(core, insn);
    Ok(())
}
