//! IN, OUT, INS, OUTS, and who may use which port.
//!
//! Source: Intel SDM vol. 1, 19.5 "Protected-mode I/O"; vol. 2A, IN, INS.

#[cfg(test)]
mod tests;

use iced_x86::{Code, Instruction, OpKind};
use wardian_cpu::Exit;

use super::advance;
use super::control::io_breakpoints;
use super::legacy::operand::{RAX, RCX, RDI, RDX, RSI, load, probe, set_sized, store};
use super::string::{address_bytes, move_index};
use crate::access::{segment_number, size_mask};
use crate::core::{Core, Privilege, seg};
use crate::trap::{Result, Trap};

enum Op {
    In,
    Out,
    Ins,
    Outs,
}

fn decode(code: Code) -> Option<(Op, usize)> {
    Some(match code {
        Code::In_AL_imm8 | Code::In_AL_DX => (Op::In, 1),
        Code::In_AX_imm8 | Code::In_AX_DX => (Op::In, 2),
        Code::In_EAX_imm8 | Code::In_EAX_DX => (Op::In, 4),
        Code::Out_imm8_AL | Code::Out_DX_AL => (Op::Out, 1),
        Code::Out_imm8_AX | Code::Out_DX_AX => (Op::Out, 2),
        Code::Out_imm8_EAX | Code::Out_DX_EAX => (Op::Out, 4),
        Code::Insb_m8_DX => (Op::Ins, 1),
        Code::Insw_m16_DX => (Op::Ins, 2),
        Code::Insd_m32_DX => (Op::Ins, 4),
        Code::Outsb_DX_m8 => (Op::Outs, 1),
        Code::Outsw_DX_m16 => (Op::Outs, 2),
        Code::Outsd_DX_m32 => (Op::Outs, 4),
        _ => return None,
    })
}

/// Runs `insn` if it is one of this module's.
pub(crate) fn interpret(core: &mut Core, insn: &Instruction) -> Option<Result<()>> {
    let (op, size) = decode(insn.code())?;
    Some(run(core, insn, &op, size))
}

fn run(core: &mut Core, insn: &Instruction, op: &Op, size: usize) -> Result<()> {
    let port = match op {
        Op::In if insn.op1_kind() == OpKind::Immediate8 => u16::from(insn.immediate8()),
        Op::Out if insn.op0_kind() == OpKind::Immediate8 => u16::from(insn.immediate8()),
        _ => core.gpr(RDX) as u16,
    };
    match op {
        Op::In => {
            permitted(core, port, size)?;
            let value = core.ask(Exit::PortIn { port, size: size as u8 })?;
            set_sized(core, RAX, size, value);
        }
        Op::Out => {
            permitted(core, port, size)?;
            let data = (core.gpr(RAX) & size_mask(size)) as u32;
            core.push_exit(Exit::PortOut { port, size: size as u8, data });
        }
        Op::Ins | Op::Outs => return string(core, insn, matches!(op, Op::Ins), port, size),
    }
    core.watch_hit |= io_breakpoints(core, port, size);
    advance(core, insn);
    Ok(())
}

/// #GP(0) unless the current code may use `size` ports from `port` on.
pub(crate) fn permitted(core: &mut Core, port: u16, size: usize) -> Result<()> {
    if !core.protected() {
        return Ok(());
    }
    let iopl = (core.c().rflags >> 12 & 3) as u8;
    if !core.v86() && core.cpl() <= iopl {
        return Ok(());
    }
    let tr = core.sys.tr;
    // Only 32- and 64-bit task-state segments (types 9 and 11) have a bitmap.
    if tr.unusable() || !tr.present() || !matches!(tr.kind(), 9 | 11) || tr.limit < 103 {
        return Err(Trap::gp(0));
    }
    let map = core.read_u16(tr.base.wrapping_add(102), Privilege::Supervisor)?;
    let at = u32::from(map) + u32::from(port / 8);
    // The processor always reads two bytes of the map.
    if at + 1 > tr.limit {
        return Err(Trap::gp(0));
    }
    let bits = core.read_u16(tr.base.wrapping_add(u64::from(at)), Privilege::Supervisor)?;
    let wanted = ((1u16 << size) - 1) << (port % 8);
    if bits & wanted != 0 { Err(Trap::gp(0)) } else { Ok(()) }
}

/// INS and OUTS, one element in a call: each is for the machine.
fn string(core: &mut Core, insn: &Instruction, input: bool, port: u16, size: usize) -> Result<()> {
    let address = address_bytes(insn);
    let mask = size_mask(address);
    let repeated = insn.has_rep_prefix() || insn.has_repne_prefix();
    let left = if repeated { core.gpr(RCX) & mask } else { 1 };
    permitted(core, port, size)?; // even when nothing is left to do
    if left == 0 {
        advance(core, insn);
        return Ok(());
    }
    if input {
        let offset = core.gpr(RDI) & mask;
        let linear = core.linear(seg::ES, offset, size, true)?;
        probe(core, linear, size)?;
        let value = core.ask(Exit::PortIn { port, size: size as u8 })?;
        store(core, linear, size, value)?;
        move_index(core, RDI, address, size, 1);
    } else {
        let offset = core.gpr(RSI) & mask;
        let linear = core.linear(segment_number(insn.memory_segment()), offset, size, false)?;
        let value = load(core, linear, size)?;
        core.push_exit(Exit::PortOut { port, size: size as u8, data: value as u32 });
        move_index(core, RSI, address, size, 1);
    }
    if repeated {
        set_sized(core, RCX, address, left - 1);
    }
    core.watch_hit |= io_breakpoints(core, port, size);
    if left == 1 {
        advance(core, insn);
    }
    Ok(())
}
