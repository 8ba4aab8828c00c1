//! Read-modify-write on memory, in general: the slow path of locked (and plain) instructions whose operand
//! translated code cannot address directly.
//!
//! Within one page of plain RAM they are atomic by a compare-exchange loop on the host address; across pages and in
//! pages that are watched or hold translated code, because no other vCPU runs guest code meanwhile. In device memory
//! they are not.
#![allow(unsafe_code)]

use core::arch::asm;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{Alu, RAX, aligned, alu, compare, load, probe, set_register, set_sized, store, value};
use crate::access::size_mask;
use crate::core::{Core, Privilege};
use crate::sys::advance;
use crate::trap::Result;

/// Compare-exchange of `size` bytes at `host`, locked.
fn exchange(host: *mut u8, size: usize, old: u64, new: u64) -> bool {
    let done: u8;
    macro_rules! locked {
        ($new:literal) => {
            // SAFETY: `host` is what `host_span` gave for a write of `size` bytes: they are live guest RAM.
            // Guest RAM is shared with other vCPUs, so it is only touched by machine instructions.
            unsafe {
                asm!(
                    concat!("lock cmpxchg [{host}], ", $new),
                    "sete {done}",
                    host = in(reg) host,
                    new = in(reg) new,
                    done = out(reg_byte) done,
                    inout("rax") old => _,
                    options(nostack),
                )
            }
        };
    }
    match size {
        1 => locked!("{new:l}"),
        2 => locked!("{new:x}"),
        4 => locked!("{new:e}"),
        _ => locked!("{new:r}"),
    }
    done != 0
}

/// Compare-exchange of 16 aligned bytes at `host`, locked: whether it was done, and what was there.
pub(super) fn exchange16(host: *mut u8, old: [u64; 2], new: [u64; 2]) -> (bool, [u64; 2]) {
    let (mut low, mut high) = (old[0], old[1]);
    let done: u8;
    // SAFETY: as in `exchange`, 16 bytes; the caller has checked the alignment. RBX is restored.
    unsafe {
        asm!(
            "xchg rsi, rbx",
            "lock cmpxchg16b [rdi]",
            "sete r8b",
            "mov rbx, rsi",
            in("rdi") host,
            inout("rsi") new[0] => _,
            in("rcx") new[1],
            inout("rax") low,
            inout("rdx") high,
            out("r8b") done,
            options(nostack),
        );
    }
    (done != 0, [low, high])
}

/// What is at `host` now.
fn peek(host: *mut u8, size: usize) -> u64 {
    let mut bytes = [0u8; 8];
    // SAFETY: as in `exchange`; a torn value only makes the exchange after it fail.
    unsafe { std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), size) };
    u64::from_le_bytes(bytes)
}

/// Replaces the `size` bytes at `linear` by `change` of them and returns what they were. `change` may be called
/// more than once.
pub(crate) fn update(
    core: &mut Core,
    linear: u64,
    size: usize,
    mut change: impl FnMut(u64) -> u64,
) -> Result<u64> {
    aligned(core, linear, size)?;
    if let Some(host) = core.host_span(linear, size, true, Privilege::Current)? {
        loop {
            let old = peek(host, size);
            if exchange(host, size, old, change(old)) {
                return Ok(old);
            }
        }
    }
    probe(core, linear, size)?;
    core.need_alone(linear, size)?;
    let old = load(core, linear, size)?;
    store(core, linear, size, change(old))?;
    Ok(old)
}

fn operation(mnemonic: Mnemonic) -> Option<Alu> {
    Some(match mnemonic {
        Mnemonic::Add => Alu::Add,
        Mnemonic::Or => Alu::Or,
        Mnemonic::Adc => Alu::Adc,
        Mnemonic::Sbb => Alu::Sbb,
        Mnemonic::And => Alu::And,
        Mnemonic::Sub => Alu::Sub,
        Mnemonic::Xor => Alu::Xor,
        Mnemonic::Inc => Alu::Inc,
        Mnemonic::Dec => Alu::Dec,
        Mnemonic::Neg => Alu::Neg,
        Mnemonic::Not => Alu::Not,
        _ => return None,
    })
}

/// Runs `insn` if it is one of this module's.
pub(crate) fn interpret(core: &mut Core, insn: &Instruction) -> Option<Result<()>> {
    if insn.op_count() == 0 || insn.op0_kind() != OpKind::Memory {
        return None;
    }
    let mnemonic = insn.mnemonic();
    let known = operation(mnemonic).is_some()
        || matches!(mnemonic, Mnemonic::Xadd | Mnemonic::Xchg | Mnemonic::Cmpxchg);
    known.then(|| run(core, insn, mnemonic))
}

fn run(core: &mut Core, insn: &Instruction, mnemonic: Mnemonic) -> Result<()> {
    let size = insn.memory_size().size();
    let linear = core.operand_address(insn, size, true)?;
    let source = if insn.op_count() > 1 { value(core, insn, 1, size)? } else { 0 };
    let flags = core.rflags();
    if let Some(op) = operation(mnemonic) {
        let old = update(core, linear, size, |old| alu(op, size, old, source, flags).0)?;
        core.set_rflags(alu(op, size, old, source, flags).1);
    } else if mnemonic == Mnemonic::Cmpxchg {
        let wanted = core.gpr(RAX) & size_mask(size);
        // Memory is written in either case (Intel SDM vol. 2A, CMPXCHG).
        let old = update(core, linear, size, |old| if old == wanted { source } else { old })?;
        core.set_rflags(compare(size, wanted, old, flags));
        if old != wanted {
            set_sized(core, RAX, size, old);
        }
    } else {
        let add = mnemonic == Mnemonic::Xadd;
        let change = |old: u64| if add { old.wrapping_add(source) } else { source };
        let old = update(core, linear, size, change)?;
        if add {
            core.set_rflags(alu(Alu::Add, size, old, source, flags).1);
        }
        set_register(core, insn.op1_register(), old);
    }
    advance(core, insn);
    Ok(())
}
