//! Operands by iced's names, and the flags of integer arithmetic.

use iced_x86::{Instruction, OpKind, Register};
use wardian_cpu::bits::rflags::{AF, ARITH, CF, OF, PF, SF, ZF};

use crate::access::size_mask;
use crate::core::{Core, Privilege};
use crate::trap::{Result, Trap};

/// RAX's number.
pub(crate) const RAX: usize = 0;
/// RCX's number.
pub(crate) const RCX: usize = 1;
/// RDX's number.
pub(crate) const RDX: usize = 2;
/// RBX's number.
pub(crate) const RBX: usize = 3;
/// RSP's number.
pub(crate) const RSP: usize = 4;
/// RBP's number.
pub(crate) const RBP: usize = 5;
/// RSI's number.
pub(crate) const RSI: usize = 6;
/// RDI's number.
pub(crate) const RDI: usize = 7;

/// (number, bit offset) of a general register's low byte.
fn place(register: Register) -> (usize, u32) {
    match register {
        Register::AH | Register::CH | Register::DH | Register::BH => (register.number() - 4, 8),
        _ => (register.number(), 0),
    }
}

/// Value of a general register of any width, zero-extended.
pub(crate) fn register(core: &Core, register: Register) -> u64 {
    let (number, shift) = place(register);
    (core.gpr(number) >> shift) & size_mask(register.size())
}

/// Writes a general register of any width as [`set_sized`] does.
pub(crate) fn set_register(core: &mut Core, register: Register, value: u64) {
    match place(register) {
        (number, 8) => {
            let old = core.gpr(number);
            core.set_gpr(number, (old & !0xff00) | ((value & 0xff) << 8));
        }
        (number, _) => set_sized(core, number, register.size(), value),
    }
}

/// Writes the low `size` bytes of general register `number` as instructions do: 32 bits zero-extend, 8 and
/// 16 leave the rest.
pub(crate) fn set_sized(core: &mut Core, number: usize, size: usize, value: u64) {
    let mask = size_mask(size);
    let rest = if size >= 4 { 0 } else { core.gpr(number) & !mask };
    core.set_gpr(number, rest | (value & mask));
}

/// Sign-extends from `size` bytes.
pub(crate) fn sign_extend(value: u64, size: usize) -> u64 {
    let unused = 64 - 8 * size.min(8) as u32;
    (((value << unused) as i64) >> unused) as u64
}

/// #AC(0) if alignment is checked and `linear` is no multiple of `size`.
pub(crate) fn aligned(core: &Core, linear: u64, size: usize) -> Result<()> {
    if size.is_power_of_two() && linear & (size as u64 - 1) != 0 && core.alignment_checked() {
        return Err(Trap::ac());
    }
    Ok(())
}

/// Reads `size` (up to 8) bytes at the current privilege.
pub(crate) fn load(core: &mut Core, linear: u64, size: usize) -> Result<u64> {
    aligned(core, linear, size)?;
    let mut bytes = [0; 8];
    core.read(linear, &mut bytes[..size], Privilege::Current)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Writes the low `size` (up to 8) bytes at the current privilege.
pub(crate) fn store(core: &mut Core, linear: u64, size: usize, value: u64) -> Result<()> {
    aligned(core, linear, size)?;
    core.write(linear, &value.to_le_bytes()[..size], Privilege::Current)
}

/// Faults as `store` would.
pub(crate) fn probe(core: &mut Core, linear: u64, size: usize) -> Result<()> {
    aligned(core, linear, size)?;
    core.probe_write(linear, size, Privilege::Current)
}

/// Value of operand `n`, a register, an immediate or memory of `size` bytes.
pub(crate) fn value(core: &mut Core, insn: &Instruction, n: u32, size: usize) -> Result<u64> {
    match insn.op_kind(n) {
        OpKind::Register => Ok(register(core, insn.op_register(n)) & size_mask(size)),
        OpKind::Memory => {
            let linear = core.operand_address(insn, size, false)?;
            load(core, linear, size)
        }
        _ => Ok(insn.try_immediate(n).unwrap_or(0) & size_mask(size)),
    }
}

/// Two-operand (and one-operand) integer arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Alu {
    Add,
    Or,
    Adc,
    Sbb,
    And,
    Sub,
    Xor,
    Inc,
    Dec,
    Neg,
    Not,
}

fn result_flags(result: u64, size: usize) -> u64 {
    let sign = 1 << (8 * size - 1);
    let mut flags = 0;
    if result == 0 {
        flags |= ZF;
    }
    if result & sign != 0 {
        flags |= SF;
    }
    if (result as u8).count_ones().is_multiple_of(2) {
        flags |= PF;
    }
    flags
}

/// CF, AF and OF from the carries out of each bit, and whose sign bit says overflow.
fn chain_flags(out: u64, over: u64, sign: u32) -> u64 {
    let bit = |bits: u64, n: u32, flag: u64| if bits >> n & 1 != 0 { flag } else { 0 };
    bit(out, sign, CF) | bit(out, 3, AF) | bit(over, sign, OF)
}

/// `a op b` on `size` bytes: the result and RFLAGS after it (from `flags` before).
pub(crate) fn alu(op: Alu, size: usize, a: u64, b: u64, flags: u64) -> (u64, u64) {
    let mask = size_mask(size);
    let sign = 8 * size as u32 - 1;
    let (a, b) = (a & mask, b & mask);
    let carry = u64::from(flags & CF != 0);
    let (result, mut arith) = match op {
        Alu::Not => return (!a & mask, flags),
        Alu::Or => (a | b, 0),
        Alu::And => (a & b, 0),
        Alu::Xor => (a ^ b, 0),
        Alu::Add | Alu::Adc | Alu::Inc => {
            let (b, c) = match op {
                Alu::Inc => (1, 0),
                Alu::Adc => (b, carry),
                _ => (b, 0),
            };
            let result = a.wrapping_add(b).wrapping_add(c) & mask;
            // Carry out of each bit.
            let out = (a & b) | ((a | b) & !result);
            let over = (a ^ result) & (b ^ result);
            let mut arith = chain_flags(out, over, sign);
            if op == Alu::Inc {
                arith = (arith & !CF) | (flags & CF);
            }
            (result, arith)
        }
        Alu::Sub | Alu::Sbb | Alu::Dec | Alu::Neg => {
            let (a, b, c) = match op {
                Alu::Dec => (a, 1, 0),
                Alu::Neg => (0, a, 0),
                Alu::Sbb => (a, b, carry),
                _ => (a, b, 0),
            };
            let result = a.wrapping_sub(b).wrapping_sub(c) & mask;
            // Borrow out of each bit.
            let out = (!a & b) | ((!a | b) & result);
            let over = (a ^ b) & (a ^ result);
            let mut arith = chain_flags(out, over, sign);
            if op == Alu::Dec {
                arith = (arith & !CF) | (flags & CF);
            }
            (result, arith)
        }
    };
    arith |= result_flags(result, size);
    (result, (flags & !ARITH) | arith)
}

/// RFLAGS after `a - b` on `size` bytes.
pub(crate) fn compare(size: usize, a: u64, b: u64, flags: u64) -> u64 {
    alu(Alu::Sub, size, a, b, flags).1
}

/// `flags` with SF, ZF and PF by the byte `result`, and the other arithmetic flags as in `rest`.
pub(crate) fn byte_flags(result: u8, rest: u64, flags: u64) -> u64 {
    (flags & !ARITH) | result_flags(u64::from(result), 1) | rest
}
