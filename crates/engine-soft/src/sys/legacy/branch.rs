//! Near control transfers: CALL, RET, JMP, Jcc, LOOPcc, JCXZ, with the checks of their targets.

use iced_x86::{Code, ConditionCode, Instruction, Mnemonic, OpKind};
use wardian_cpu::bits::rflags::{CF, OF, PF, SF, ZF};

use super::operand::{RCX, set_sized, store, value};
use super::stack::{moved, set_stack_pointer, slot, top};
use crate::access::size_mask;
use crate::core::{Core, seg};
use crate::sys::{advance, canonical, clear_rf};
use crate::trap::{Result, Trap};

/// #GP(0) if no near transfer can go to `target` (Intel SDM vol. 2A, JMP).
pub(crate) fn check_target(core: &Core, target: u64) -> Result<()> {
    let good = if core.is_64bit() {
        canonical(target)
    } else {
        target <= u64::from(core.sys.segments[seg::CS].limit)
    };
    if good { Ok(()) } else { Err(Trap::gp(0)) }
}

/// Whether `condition` holds in `flags`.
pub(crate) fn holds(condition: ConditionCode, flags: u64) -> bool {
    let set = |bit: u64| flags & bit != 0;
    let less = set(SF) != set(OF);
    match condition {
        ConditionCode::None => false,
        ConditionCode::o => set(OF),
        ConditionCode::no => !set(OF),
        ConditionCode::b => set(CF),
        ConditionCode::ae => !set(CF),
        ConditionCode::e => set(ZF),
        ConditionCode::ne => !set(ZF),
        ConditionCode::be => set(CF) || set(ZF),
        ConditionCode::a => !set(CF) && !set(ZF),
        ConditionCode::s => set(SF),
        ConditionCode::ns => !set(SF),
        ConditionCode::p => set(PF),
        ConditionCode::np => !set(PF),
        ConditionCode::l => less,
        ConditionCode::ge => !less,
        ConditionCode::le => less || set(ZF),
        ConditionCode::g => !less && !set(ZF),
    }
}

/// Target and operand size of a direct near branch.
fn direct(insn: &Instruction) -> Option<(u64, usize)> {
    let size = match insn.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::NearBranch64 => 8,
        _ => return None,
    };
    Some((insn.near_branch_target() & size_mask(size), size))
}

/// Runs `insn` if it is one of this module's.
pub(crate) fn interpret(core: &mut Core, insn: &Instruction) -> Option<Result<()>> {
    let code = insn.code();
    match code {
        Code::Call_rel16 | Code::Call_rel32_32 | Code::Call_rel32_64 => {
            let (target, size) = direct(insn)?;
            Some(call(core, insn, target, size))
        }
        Code::Call_rm16 => Some(call_indirect(core, insn, 2)),
        Code::Call_rm32 => Some(call_indirect(core, insn, 4)),
        Code::Call_rm64 => Some(call_indirect(core, insn, 8)),
        Code::Jmp_rm16 => Some(jump_indirect(core, insn, 2)),
        Code::Jmp_rm32 => Some(jump_indirect(core, insn, 4)),
        Code::Jmp_rm64 => Some(jump_indirect(core, insn, 8)),
        Code::Retnw | Code::Retnw_imm16 => Some(ret(core, insn, 2)),
        Code::Retnd | Code::Retnd_imm16 => Some(ret(core, insn, 4)),
        Code::Retnq | Code::Retnq_imm16 => Some(ret(core, insn, 8)),
        _ => match insn.mnemonic() {
            Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => Some(count_down(core, insn)),
            Mnemonic::Jcxz => Some(jump_if_zero(core, insn, 2)),
            Mnemonic::Jecxz => Some(jump_if_zero(core, insn, 4)),
            Mnemonic::Jrcxz => Some(jump_if_zero(core, insn, 8)),
            Mnemonic::Jmp => direct(insn).map(|(target, _)| jump(core, target)),
            _ if insn.is_jcc_short_or_near() => {
                let taken = holds(insn.condition_code(), core.rflags());
                Some(branch(core, insn, taken))
            }
            _ => None,
        },
    }
}

fn jump(core: &mut Core, target: u64) -> Result<()> {
    check_target(core, target)?;
    core.set_rip(target);
    clear_rf(core);
    Ok(())
}

fn branch(core: &mut Core, insn: &Instruction, taken: bool) -> Result<()> {
    match direct(insn) {
        Some((target, _)) if taken => jump(core, target),
        _ => {
            advance(core, insn);
            Ok(())
        }
    }
}

fn call(core: &mut Core, insn: &Instruction, target: u64, size: usize) -> Result<()> {
    let new_top = moved(core, -(size as i64));
    let linear = slot(core, new_top, size, true)?;
    check_target(core, target)?;
    store(core, linear, size, insn.next_ip())?;
    set_stack_pointer(core, new_top);
    core.set_rip(target);
    clear_rf(core);
    Ok(())
}

fn call_indirect(core: &mut Core, insn: &Instruction, size: usize) -> Result<()> {
    let target = value(core, insn, 0, size)?;
    call(core, insn, target, size)
}

fn jump_indirect(core: &mut Core, insn: &Instruction, size: usize) -> Result<()> {
    let target = value(core, insn, 0, size)?;
    jump(core, target)
}

fn ret(core: &mut Core, insn: &Instruction, size: usize) -> Result<()> {
    let target = top(core, size)?;
    let release = if insn.op_count() == 1 { i64::from(insn.immediate16()) } else { 0 };
    let after = moved(core, size as i64 + release);
    check_target(core, target)?;
    set_stack_pointer(core, after);
    core.set_rip(target);
    clear_rf(core);
    Ok(())
}

/// Bytes of the count register of a LOOP.
fn count_size(code: Code) -> usize {
    match code {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => 2,
        Code::Loop_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loopne_rel8_16_RCX
        | Code::Loopne_rel8_64_RCX => 8,
        _ => 4,
    }
}

fn count_down(core: &mut Core, insn: &Instruction) -> Result<()> {
    let size = count_size(insn.code());
    let count = core.gpr(RCX).wrapping_sub(1) & size_mask(size);
    let zero = core.rflags() & ZF != 0;
    let taken = count != 0
        && match insn.mnemonic() {
            Mnemonic::Loope => zero,
            Mnemonic::Loopne => !zero,
            _ => true,
        };
    branch(core, insn, taken)?;
    set_sized(core, RCX, size, count);
    Ok(())
}

fn jump_if_zero(core: &mut Core, insn: &Instruction, size: usize) -> Result<()> {
    let taken = core.gpr(RCX) & size_mask(size) == 0;
    branch(core, insn, taken)
}
