//! PUSH and POP in every form but flags and segment registers; PUSHA, POPA, ENTER, LEAVE.
//!
//! Translated code does the plain forms itself; they come here when the stack segment is not flat.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::operand::{RBP, RSP, load, probe, register, set_register, set_sized, store, value};
use crate::core::{Core, seg};
use crate::sys::advance;
use crate::trap::Result;

/// Bytes of the stack pointer that count: 2, 4 or 8 (Intel SDM vol. 1, 6.2.3).
pub(crate) fn stack_size(core: &Core) -> usize {
    if core.is_64bit() {
        8
    } else if core.sys.segments[seg::SS].big() {
        4
    } else {
        2
    }
}

/// The stack pointer moved by `by` bytes, as far as it counts.
pub(crate) fn moved(core: &Core, by: i64) -> u64 {
    core.gpr(RSP).wrapping_add(by as u64) & crate::access::size_mask(stack_size(core))
}

/// Writes the part of the stack pointer that counts.
pub(crate) fn set_stack_pointer(core: &mut Core, value: u64) {
    set_sized(core, RSP, stack_size(core), value);
}

/// Linear address of `size` bytes at stack offset `offset`.
pub(crate) fn slot(core: &mut Core, offset: u64, size: usize, write: bool) -> Result<u64> {
    core.linear(seg::SS, offset, size, write)
}

/// Pushes `size` bytes; nothing has changed if it fails.
pub(crate) fn push(core: &mut Core, size: usize, value: u64) -> Result<()> {
    let top = moved(core, -(size as i64));
    let linear = slot(core, top, size, true)?;
    store(core, linear, size, value)?;
    set_stack_pointer(core, top);
    Ok(())
}

/// Reads the top `size` bytes and leaves the stack pointer.
pub(crate) fn top(core: &mut Core, size: usize) -> Result<u64> {
    let offset = moved(core, 0);
    let linear = slot(core, offset, size, false)?;
    load(core, linear, size)
}

/// Operand size and form of a PUSH or POP.
#[derive(Clone, Copy)]
enum Form {
    Push(usize),
    Pop(usize),
    PushAll(usize),
    PopAll(usize),
    Enter(usize),
    Leave(usize),
}

fn form(code: Code) -> Option<Form> {
    Some(match code {
        Code::Push_r16 | Code::Push_rm16 | Code::Push_imm16 | Code::Pushw_imm8 => Form::Push(2),
        Code::Push_r32 | Code::Push_rm32 | Code::Pushd_imm32 | Code::Pushd_imm8 => Form::Push(4),
        Code::Push_r64 | Code::Push_rm64 | Code::Pushq_imm32 | Code::Pushq_imm8 => Form::Push(8),
        Code::Pop_r16 | Code::Pop_rm16 => Form::Pop(2),
        Code::Pop_r32 | Code::Pop_rm32 => Form::Pop(4),
        Code::Pop_r64 | Code::Pop_rm64 => Form::Pop(8),
        Code::Pushaw => Form::PushAll(2),
        Code::Pushad => Form::PushAll(4),
        Code::Popaw => Form::PopAll(2),
        Code::Popad => Form::PopAll(4),
        Code::Enterw_imm16_imm8 => Form::Enter(2),
        Code::Enterd_imm16_imm8 => Form::Enter(4),
        Code::Enterq_imm16_imm8 => Form::Enter(8),
        Code::Leavew => Form::Leave(2),
        Code::Leaved => Form::Leave(4),
        Code::Leaveq => Form::Leave(8),
        _ => return None,
    })
}

/// Runs `insn` if it is one of this module's.
pub(crate) fn interpret(core: &mut Core, insn: &Instruction) -> Option<Result<()>> {
    Some(run(core, insn, form(insn.code())?))
}

fn run(core: &mut Core, insn: &Instruction, form: Form) -> Result<()> {
    match form {
        Form::Push(size) => {
            // The operand's address and the value of SP are those before the push.
            let value = value(core, insn, 0, size)?;
            push(core, size, value)?;
        }
        Form::Pop(size) => pop(core, insn, size)?,
        Form::PushAll(size) => push_all(core, size)?,
        Form::PopAll(size) => pop_all(core, size)?,
        Form::Enter(size) => enter(core, insn, size)?,
        Form::Leave(size) => leave(core, size)?,
    }
    advance(core, insn);
    Ok(())
}

fn pop(core: &mut Core, insn: &Instruction, size: usize) -> Result<()> {
    let popped = top(core, size)?;
    let after = moved(core, size as i64);
    let before = core.gpr(RSP);
    set_stack_pointer(core, after);
    if insn.op0_kind() == OpKind::Register {
        set_register(core, insn.op0_register(), popped);
        return Ok(());
    }
    // An address that uses SP uses its value after the pop.
    let done = core.operand_address(insn, size, true).and_then(|linear| store(core, linear, size, popped));
    if done.is_err() {
        core.set_gpr(RSP, before);
    }
    done
}

fn push_all(core: &mut Core, size: usize) -> Result<()> {
    let mut slots = [0; 8];
    for (n, linear) in slots.iter_mut().enumerate() {
        let offset = moved(core, -(((n + 1) * size) as i64));
        *linear = slot(core, offset, size, true)?;
        probe(core, *linear, size)?;
    }
    for (n, linear) in slots.into_iter().enumerate() {
        let value = core.gpr(n);
        store(core, linear, size, value)?;
    }
    let top = moved(core, -((8 * size) as i64));
    set_stack_pointer(core, top);
    Ok(())
}

fn pop_all(core: &mut Core, size: usize) -> Result<()> {
    let mut values = [0; 8];
    for (n, value) in values.iter_mut().enumerate() {
        let offset = moved(core, (n * size) as i64);
        let linear = slot(core, offset, size, false)?;
        *value = load(core, linear, size)?;
    }
    let after = moved(core, (8 * size) as i64);
    for (n, value) in values.into_iter().enumerate() {
        let number = 7 - n;
        if number != RSP {
            set_sized(core, number, size, value);
        }
    }
    set_stack_pointer(core, after);
    Ok(())
}

/// ENTER (Intel SDM vol. 2A): with nesting, the frame pointers of the enclosing procedures are copied.
fn enter(core: &mut Core, insn: &Instruction, size: usize) -> Result<()> {
    let reserved = i64::from(insn.immediate16());
    let level = usize::from(insn.immediate8_2nd() & 31);
    let step = size as i64;
    let frame = moved(core, -step);
    let pushes = if level == 0 { 1 } else { level + 1 };
    let end = moved(core, -(step * pushes as i64) - reserved);
    let old = core.gpr(RBP);
    let mask = crate::access::size_mask(stack_size(core));
    // First only the checks, then the work.
    for work in [false, true] {
        for n in 0..pushes {
            let value = if n == 0 {
                old
            } else if n == level {
                frame
            } else {
                let from = old.wrapping_sub((n * size) as u64) & mask;
                let linear = slot(core, from, size, false)?;
                load(core, linear, size)?
            };
            let offset = moved(core, -(step * (n as i64 + 1)));
            let linear = slot(core, offset, size, true)?;
            if work {
                store(core, linear, size, value)?;
            } else {
                probe(core, linear, size)?;
            }
        }
        let last = slot(core, end, size, true)?;
        probe(core, last, size)?;
    }
    // A 16-bit ENTER writes BP alone.
    let written = if size == 2 { 2 } else { stack_size(core) };
    set_sized(core, RBP, written, frame);
    set_stack_pointer(core, end);
    Ok(())
}

fn leave(core: &mut Core, size: usize) -> Result<()> {
    let mask = crate::access::size_mask(stack_size(core));
    let frame = register(core, Register::RBP) & mask;
    let linear = slot(core, frame, size, false)?;
    let value = load(core, linear, size)?;
    set_stack_pointer(core, frame.wrapping_add(size as u64));
    set_sized(core, RBP, size, value);
    Ok(())
}
