//! AVX-512 instructions whose memory elements are found one by one: gathers, scatters, compressing stores, expanding
//! loads.
//!
//! Source: Intel SDM vol. 2, VGATHERDPS and kin (EVEX forms), VSCATTERDPS and kin, VPCOMPRESSB and kin, VPEXPANDB and
//! kin. An element that completed has its mask bit cleared and is not done again after a fault.

use iced_x86::{EncodingKind, Instruction, Mnemonic as M, OpKind, Register};
use wardian_cpu::bits::cr0;

use super::advance;
use super::legacy::operand::{load, sign_extend};
use super::vector_ops::{Indexed, avx, get, put, set_vec, vec};
use crate::core::{Core, Privilege};
use crate::trap::{Result, Trap};

/// (element size, whether it is an expanding load) of a compressing or expanding instruction.
pub(crate) fn packed(m: M) -> Option<(usize, bool)> {
    Some(match m {
        M::Vpcompressb => (1, false),
        M::Vpcompressw => (2, false),
        M::Vpcompressd | M::Vcompressps => (4, false),
        M::Vpcompressq | M::Vcompresspd => (8, false),
        M::Vpexpandb => (1, true),
        M::Vpexpandw => (2, true),
        M::Vpexpandd | M::Vexpandps => (4, true),
        M::Vpexpandq | M::Vexpandpd => (8, true),
        _ => return None,
    })
}

/// (index size, element size, whether it is a scatter).
fn indexed(m: M) -> Option<(usize, usize, bool)> {
    Some(match m {
        M::Vpgatherdd | M::Vgatherdps => (4, 4, false),
        M::Vpgatherdq | M::Vgatherdpd => (4, 8, false),
        M::Vpgatherqd | M::Vgatherqps => (8, 4, false),
        M::Vpgatherqq | M::Vgatherqpd => (8, 8, false),
        M::Vpscatterdd | M::Vscatterdps => (4, 4, true),
        M::Vpscatterdq | M::Vscatterdpd => (4, 8, true),
        M::Vpscatterqd | M::Vscatterqps => (8, 4, true),
        M::Vpscatterqq | M::Vscatterqpd => (8, 8, true),
        _ => return None,
    })
}

/// Runs `insn` if it is one of this module's.
pub(crate) fn interpret(core: &mut Core, insn: &Instruction) -> Option<Result<()>> {
    if insn.code().op_code().encoding() != EncodingKind::EVEX {
        return None;
    }
    let m = insn.mnemonic();
    if let Some((index, size, scatter)) = indexed(m) {
        return Some(each(core, insn, index, size, scatter));
    }
    match packed(m)? {
        (size, true) if insn.op1_kind() == OpKind::Memory => Some(expand(core, insn, size)),
        (size, false) if insn.op0_kind() == OpKind::Memory => Some(compress(core, insn, size)),
        _ => None,
    }
}

/// #UD and #NM of EVEX instructions (SDM vol. 2A, 2.8).
fn available(core: &Core) -> Result<()> {
    if core.sys.xcr0 & 0xe0 != 0xe0 {
        return Err(Trap::ud());
    }
    avx(core)?;
    if core.sys.cr0 & cr0::TS != 0 { Err(Trap::nm()) } else { Ok(()) }
}

/// Writes a vector register, whose bits from `len` bytes on become zero.
fn set_vector(core: &mut Core, register: Register, mut value: [u8; 64], len: usize) {
    value[len..].fill(0);
    if value[32..] != [0; 32] {
        core.ctx.get_mut().vec_mode = 2;
    }
    set_vec(core, register, value);
}

/// Gathers and scatters.
fn each(core: &mut Core, insn: &Instruction, index_size: usize, size: usize, scatter: bool) -> Result<()> {
    let (k, index) = (insn.op_mask(), insn.memory_index());
    let data = if scatter { insn.op1_register() } else { insn.op0_register() };
    if k == Register::None || (!scatter && data.number() == index.number()) {
        return Err(Trap::ud());
    }
    available(core)?;
    let count = if size >= index_size { data.size() / size } else { index.size() / index_size };
    let place = Indexed::of(core, insn);
    let indices = vec(core, index);
    let mut value = vec(core, data);
    let old_mask = core.c().mask[k.number()];
    let mut mask = old_mask;
    let mut result = Ok(());
    for n in 0..count {
        if mask >> n & 1 == 0 {
            continue;
        }
        let at = place.element(sign_extend(get(&indices, n, index_size), index_size));
        let done = core.linear(place.segment, at, size, scatter).and_then(|linear| {
            if scatter {
                core.write(linear, &value[n * size..(n + 1) * size], Privilege::Current)
            } else {
                put(&mut value, n, size, load(core, linear, size)?);
                Ok(())
            }
        });
        match done {
            Ok(()) => mask &= !(1 << n),
            // A question to the machine runs the instruction again from its start.
            Err(trap @ Trap::Exit(_)) => return Err(trap),
            Err(trap) => {
                result = Err(trap);
                break;
            }
        }
    }
    // The bits above the elements are cleared when all are done.
    core.ctx.get_mut().mask[k.number()] = if result.is_ok() { 0 } else { mask };
    if !scatter && (result.is_ok() || mask != old_mask) {
        // A fault keeps what lies above the elements, as far as the vector length goes.
        let len = if result.is_ok() { count * size } else { data.size().max(index.size()) };
        set_vector(core, data, value, len);
    }
    result?;
    advance(core, insn);
    Ok(())
}

/// The elements that the mask has; all without a mask register.
fn chosen(core: &Core, insn: &Instruction, count: usize) -> u64 {
    let all = u64::MAX >> (64 - count);
    match insn.op_mask() {
        Register::None => all,
        k => core.c().mask[k.number()] & all,
    }
}

fn compress(core: &mut Core, insn: &Instruction, size: usize) -> Result<()> {
    available(core)?;
    let from = insn.op1_register();
    let count = from.size() / size;
    let mask = chosen(core, insn, count);
    let value = vec(core, from);
    let (mut out, mut len) = ([0u8; 64], 0);
    for n in (0..count).filter(|n| mask >> n & 1 != 0) {
        out[len..len + size].copy_from_slice(&value[n * size..(n + 1) * size]);
        len += size;
    }
    if len != 0 {
        let linear = core.operand_address(insn, len, true)?;
        if insn.has_op_mask() {
            // Then a second page faults at the last byte.
            core.probe_write(linear, 1, Privilege::Current)?;
            core.probe_write(linear.wrapping_add(len as u64 - 1), 1, Privilege::Current)?;
        }
        core.write(linear, &out[..len], Privilege::Current)?;
    }
    advance(core, insn);
    Ok(())
}

fn expand(core: &mut Core, insn: &Instruction, size: usize) -> Result<()> {
    available(core)?;
    let to = insn.op0_register();
    let count = to.size() / size;
    let mask = chosen(core, insn, count);
    let len = mask.count_ones() as usize * size;
    let mut memory = [0u8; 64];
    if len != 0 {
        let linear = core.operand_address(insn, len, false)?;
        core.read(linear, &mut memory[..len], Privilege::Current)?;
    }
    let mut value = if insn.zeroing_masking() { [0; 64] } else { vec(core, to) };
    let mut at = 0;
    for n in (0..count).filter(|n| mask >> n & 1 != 0) {
        value[n * size..(n + 1) * size].copy_from_slice(&memory[at..at + size]);
        at += size;
    }
    set_vector(core, to, value, to.size());
    advance(core, insn);
    Ok(())
}
