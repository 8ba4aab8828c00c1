//! Instructions that cannot be copied to a 64-bit host processor, and slow forms of those that can.

pub(crate) mod branch;
#[cfg(test)]
pub(crate) mod harness;
pub(crate) mod locked;
pub(crate) mod operand;
pub(crate) mod stack;
#[cfg(test)]
mod tests;

use iced_x86::{Code, Instruction, Mnemonic, Register};
use wardian_cpu::bits::rflags::{AF, CF, OF, PF, SF, ZF};
use wardian_cpu::bits::vector;

use self::operand::{
    RAX, RBX, RCX, RDX, byte_flags, load, probe, register, set_register, set_sized, sign_extend, store,
};
use super::{advance, set_zf};
use crate::core::{Core, Privilege};
use crate::trap::{Result, Trap};

/// Runs `insn` if it is one of this module's.
pub(crate) fn interpret(core: &mut Core, insn: &Instruction) -> Option<Result<()>> {
    branch::interpret(core, insn)
        .or_else(|| stack::interpret(core, insn))
        .or_else(|| locked::interpret(core, insn))
        .or_else(|| super::bits::interpret(core, insn))
        .or_else(|| other(core, insn))
}

fn other(core: &mut Core, insn: &Instruction) -> Option<Result<()>> {
    let done = match insn.code() {
        Code::Aaa | Code::Aas | Code::Daa | Code::Das | Code::Salc => {
            decimal(core, insn.mnemonic());
            Ok(())
        }
        Code::Aam_imm8 => divide_decimal(core, insn.immediate8()),
        Code::Aad_imm8 => {
            let [al, ah, ..] = core.gpr(RAX).to_le_bytes();
            let result = al.wrapping_add(ah.wrapping_mul(insn.immediate8()));
            set_sized(core, RAX, 2, u64::from(result));
            let flags = byte_flags(result, 0, core.rflags());
            core.set_rflags(flags);
            Ok(())
        }
        Code::Bound_r16_m1616 => bound(core, insn, 2),
        Code::Bound_r32_m3232 => bound(core, insn, 4),
        Code::Lahf | Code::Sahf if core.is_64bit() && !core.model.has(wardian_cpu::Feature::LahfLm) => {
            Err(Trap::ud())
        }
        Code::Lahf => {
            let flags = core.rflags() & 0xff;
            set_register(core, Register::AH, flags);
            Ok(())
        }
        Code::Sahf => {
            let mask = SF | ZF | AF | PF | CF;
            let flags = (core.rflags() & !mask) | (register(core, Register::AH) & mask);
            core.set_rflags(flags);
            Ok(())
        }
        Code::Clc | Code::Stc | Code::Cmc => {
            let flags = core.rflags();
            core.set_rflags(match insn.code() {
                Code::Clc => flags & !CF,
                Code::Stc => flags | CF,
                _ => flags ^ CF,
            });
            Ok(())
        }
        Code::Xlat_m8 => core
            .operand_address(insn, 1, false)
            .and_then(|linear| load(core, linear, 1))
            .map(|value| set_sized(core, RAX, 1, value)),
        Code::Mov_AL_moffs8
        | Code::Mov_AX_moffs16
        | Code::Mov_EAX_moffs32
        | Code::Mov_RAX_moffs64
        | Code::Movbe_r16_m16
        | Code::Movbe_r32_m32
        | Code::Movbe_r64_m64 => load_register(core, insn),
        Code::Mov_moffs8_AL
        | Code::Mov_moffs16_AX
        | Code::Mov_moffs32_EAX
        | Code::Mov_moffs64_RAX
        | Code::Movbe_m16_r16
        | Code::Movbe_m32_r32
        | Code::Movbe_m64_r64 => store_register(core, insn),
        Code::Cmpxchg8b_m64 => exchange8(core, insn),
        Code::Cmpxchg16b_m128 => exchange16(core, insn),
        _ => return None,
    };
    Some(done.map(|()| advance(core, insn)))
}

/// AAA, AAS, DAA, DAS (Intel SDM vol. 2A) and SALC. Undefined flags stay, except where the processors agree.
fn decimal(core: &mut Core, mnemonic: Mnemonic) {
    let flags = core.rflags();
    let ax = core.gpr(RAX) as u16;
    let al = ax as u8;
    let (carry, adjust) = (flags & CF != 0, flags & AF != 0);
    let low = al & 15 > 9 || adjust;
    match mnemonic {
        Mnemonic::Aaa | Mnemonic::Aas => {
            let sum = match (low, mnemonic) {
                (false, _) => ax,
                (true, Mnemonic::Aaa) => ax.wrapping_add(0x106),
                (true, _) => ax.wrapping_sub(6).wrapping_sub(0x100),
            };
            set_sized(core, RAX, 2, u64::from(sum & 0xff0f));
            let both = if low { CF | AF } else { 0 };
            core.set_rflags((flags & !(CF | AF)) | both);
        }
        Mnemonic::Daa | Mnemonic::Das => {
            let high = al > 0x99 || carry;
            let add = mnemonic == Mnemonic::Daa;
            let step = if low { 6u8 } else { 0 } + if high { 0x60 } else { 0 };
            let result = if add { al.wrapping_add(step) } else { al.wrapping_sub(step) };
            // DAS also carries when the first step borrows (SDM vol. 2A, DAS).
            let borrow = !add && low && al < 6;
            let mut rest = flags & OF;
            if high || borrow {
                rest |= CF;
            }
            if low {
                rest |= AF;
            }
            set_sized(core, RAX, 1, u64::from(result));
            core.set_rflags(byte_flags(result, rest, flags));
        }
        _ => set_sized(core, RAX, 1, if carry { 0xff } else { 0 }),
    }
}

/// AAM.
fn divide_decimal(core: &mut Core, base: u8) -> Result<()> {
    let al = core.gpr(RAX) as u8;
    let (Some(high), Some(low)) = (al.checked_div(base), al.checked_rem(base)) else {
        return Err(Trap::vector(vector::DE));
    };
    set_sized(core, RAX, 2, u64::from(u16::from_le_bytes([low, high])));
    let flags = byte_flags(low, 0, core.rflags());
    core.set_rflags(flags);
    Ok(())
}

fn bound(core: &mut Core, insn: &Instruction, size: usize) -> Result<()> {
    let linear = core.operand_address(insn, 2 * size, false)?;
    let mut bytes = [0u8; 8];
    core.read(linear, &mut bytes[..2 * size], Privilege::Current)?;
    let both = u64::from_le_bytes(bytes);
    let signed = |value: u64| sign_extend(value, size) as i64;
    let index = signed(register(core, insn.op0_register()));
    if index < signed(both) || index > signed(both >> (8 * size)) {
        return Err(Trap::vector(vector::BR));
    }
    Ok(())
}

/// `value` of `size` bytes, its bytes reversed if `insn` is MOVBE.
fn ordered(insn: &Instruction, size: usize, value: u64) -> u64 {
    if insn.mnemonic() == Mnemonic::Movbe { value.swap_bytes() >> (64 - 8 * size) } else { value }
}

/// MOV from an offset, MOVBE from memory.
fn load_register(core: &mut Core, insn: &Instruction) -> Result<()> {
    let size = insn.op0_register().size();
    let linear = core.operand_address(insn, size, false)?;
    let value = load(core, linear, size)?;
    set_register(core, insn.op0_register(), ordered(insn, size, value));
    Ok(())
}

/// MOV to an offset, MOVBE to memory.
fn store_register(core: &mut Core, insn: &Instruction) -> Result<()> {
    let size = insn.op1_register().size();
    let linear = core.operand_address(insn, size, true)?;
    let value = register(core, insn.op1_register());
    store(core, linear, size, ordered(insn, size, value))
}

fn exchange8(core: &mut Core, insn: &Instruction) -> Result<()> {
    let linear = core.operand_address(insn, 8, true)?;
    let pair = |core: &Core, high: usize, low: usize| (core.gpr(high) << 32) | (core.gpr(low) & 0xffff_ffff);
    let wanted = pair(core, RDX, RAX);
    let new = pair(core, RCX, RBX);
    let old = locked::update(core, linear, 8, |old| if old == wanted { new } else { old })?;
    if old != wanted {
        core.set_gpr(RAX, old & 0xffff_ffff);
        core.set_gpr(RDX, old >> 32);
    }
    set_zf(core, old == wanted);
    Ok(())
}

fn exchange16(core: &mut Core, insn: &Instruction) -> Result<()> {
    let linear = core.operand_address(insn, 16, true)?;
    if linear & 15 != 0 {
        return Err(Trap::gp(0));
    }
    let wanted = [core.gpr(RAX), core.gpr(RDX)];
    let new = [core.gpr(RBX), core.gpr(RCX)];
    let (done, old) = if let Some(host) = core.host_span(linear, 16, true, Privilege::Current)? {
        locked::exchange16(host, wanted, new)
    } else {
        probe(core, linear, 16)?;
        core.need_alone(linear, 16)?;
        let mut bytes = [0u8; 16];
        core.read(linear, &mut bytes, Privilege::Current)?;
        let whole = u128::from_le_bytes(bytes);
        let old = [whole as u64, (whole >> 64) as u64];
        let [low, high] = if old == wanted { new } else { old };
        let data = (u128::from(high) << 64 | u128::from(low)).to_le_bytes();
        core.write(linear, &data, Privilege::Current)?;
        (old == wanted, old)
    };
    if !done {
        core.set_gpr(RAX, old[0]);
        core.set_gpr(RDX, old[1]);
    }
    set_zf(core, done);
    Ok(())
}
