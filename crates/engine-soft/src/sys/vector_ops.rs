//! Vector instructions whose elements fault one by one: gathers (AVX2 forms), masked moves, byte-masked stores.
//!
//! Source: Intel SDM vol. 2C, VGATHERDPS/VPGATHERDD, VMASKMOV, VPMASKMOV; vol. 2B, MASKMOVDQU, MASKMOVQ.

#[cfg(test)]
mod tests;

use iced_x86::{Code, Instruction, Register};
use wardian_cpu::bits::{cr0, cr4, vector};

use super::advance;
use super::legacy::operand::{RDI, load, probe, sign_extend, store};
use super::string::address_bytes;
use crate::access::{operand_segment, size_mask};
use crate::core::{Core, Privilege};
use crate::trap::{Result, Trap};

/// #UD and #NM of VEX instructions (SDM vol. 2A, table 2-20 and kin).
pub(super) fn avx(core: &Core) -> Result<()> {
    let enabled =
        core.protected() && !core.v86() && core.sys.cr4 & cr4::OSXSAVE != 0 && core.sys.xcr0 & 6 == 6;
    if !enabled {
        return Err(Trap::ud());
    }
    if core.sys.cr0 & cr0::TS != 0 { Err(Trap::nm()) } else { Ok(()) }
}

/// (index size, element size, elements) of a gather.
fn gather_shape(code: Code) -> Option<(usize, usize, usize)> {
    Some(match code {
        Code::VEX_Vpgatherdd_xmm_vm32x_xmm | Code::VEX_Vgatherdps_xmm_vm32x_xmm => (4, 4, 4),
        Code::VEX_Vpgatherdd_ymm_vm32y_ymm | Code::VEX_Vgatherdps_ymm_vm32y_ymm => (4, 4, 8),
        Code::VEX_Vpgatherdq_xmm_vm32x_xmm | Code::VEX_Vgatherdpd_xmm_vm32x_xmm => (4, 8, 2),
        Code::VEX_Vpgatherdq_ymm_vm32x_ymm | Code::VEX_Vgatherdpd_ymm_vm32x_ymm => (4, 8, 4),
        Code::VEX_Vpgatherqd_xmm_vm64x_xmm | Code::VEX_Vgatherqps_xmm_vm64x_xmm => (8, 4, 2),
        Code::VEX_Vpgatherqd_xmm_vm64y_xmm | Code::VEX_Vgatherqps_xmm_vm64y_xmm => (8, 4, 4),
        Code::VEX_Vpgatherqq_xmm_vm64x_xmm | Code::VEX_Vgatherqpd_xmm_vm64x_xmm => (8, 8, 2),
        Code::VEX_Vpgatherqq_ymm_vm64y_ymm | Code::VEX_Vgatherqpd_ymm_vm64y_ymm => (8, 8, 4),
        _ => return None,
    })
}

/// (element size, elements, store) of a masked move.
fn masked_shape(code: Code) -> Option<(usize, usize, bool)> {
    Some(match code {
        Code::VEX_Vmaskmovps_xmm_xmm_m128 | Code::VEX_Vpmaskmovd_xmm_xmm_m128 => (4, 4, false),
        Code::VEX_Vmaskmovps_ymm_ymm_m256 | Code::VEX_Vpmaskmovd_ymm_ymm_m256 => (4, 8, false),
        Code::VEX_Vmaskmovpd_xmm_xmm_m128 | Code::VEX_Vpmaskmovq_xmm_xmm_m128 => (8, 2, false),
        Code::VEX_Vmaskmovpd_ymm_ymm_m256 | Code::VEX_Vpmaskmovq_ymm_ymm_m256 => (8, 4, false),
        Code::VEX_Vmaskmovps_m128_xmm_xmm | Code::VEX_Vpmaskmovd_m128_xmm_xmm => (4, 4, true),
        Code::VEX_Vmaskmovps_m256_ymm_ymm | Code::VEX_Vpmaskmovd_m256_ymm_ymm => (4, 8, true),
        Code::VEX_Vmaskmovpd_m128_xmm_xmm | Code::VEX_Vpmaskmovq_m128_xmm_xmm => (8, 2, true),
        Code::VEX_Vmaskmovpd_m256_ymm_ymm | Code::VEX_Vpmaskmovq_m256_ymm_ymm => (8, 4, true),
        _ => return None,
    })
}

/// Runs `insn` if it is one of this module's.
pub(crate) fn interpret(core: &mut Core, insn: &Instruction) -> Option<Result<()>> {
    let code = insn.code();
    if let Some((index, size, count)) = gather_shape(code) {
        return Some(gather(core, insn, index, size, count));
    }
    if let Some((size, count, write)) = masked_shape(code) {
        return Some(if write {
            masked_store(core, insn, size, count)
        } else {
            masked_load(core, insn, size, count)
        });
    }
    match code {
        Code::Maskmovdqu_rDI_xmm_xmm | Code::VEX_Vmaskmovdqu_rDI_xmm_xmm => Some(mask_bytes(core, insn)),
        Code::Maskmovq_rDI_mm_mm => Some(mask_mmx(core, insn)),
        _ => None,
    }
}

pub(super) fn vec(core: &Core, register: Register) -> [u8; 64] {
    core.c().vec[register.number() & 31]
}

pub(super) fn set_vec(core: &mut Core, register: Register, value: [u8; 64]) {
    core.ctx.get_mut().vec[register.number() & 31] = value;
}

pub(super) fn get(bytes: &[u8; 64], n: usize, size: usize) -> u64 {
    let mut out = [0u8; 8];
    out[..size].copy_from_slice(&bytes[n * size..(n + 1) * size]);
    u64::from_le_bytes(out)
}

pub(super) fn put(bytes: &mut [u8; 64], n: usize, size: usize, value: u64) {
    bytes[n * size..(n + 1) * size].copy_from_slice(&value.to_le_bytes()[..size]);
}

/// Whether the mask has element `n`.
fn chosen(mask: &[u8; 64], n: usize, size: usize) -> bool {
    mask[(n + 1) * size - 1] & 0x80 != 0
}

/// A memory operand with a vector of indices.
pub(super) struct Indexed {
    pub(super) segment: usize,
    base: u64,
    scale: u64,
    mask: u64,
}

impl Indexed {
    pub(super) fn of(core: &Core, insn: &Instruction) -> Indexed {
        let (base, bytes) = match insn.memory_base() {
            Register::None if core.is_64bit() && insn.memory_displ_size() != 4 => (0, 8),
            Register::None => (0, 4),
            base => (core.gpr(base.number()) & size_mask(base.size()), base.size()),
        };
        Indexed {
            segment: operand_segment(insn, core.is_64bit()),
            base: base.wrapping_add(insn.memory_displacement64()),
            scale: u64::from(insn.memory_index_scale()),
            mask: size_mask(bytes),
        }
    }

    /// Effective address of the element with this index.
    pub(super) fn element(&self, index: u64) -> u64 {
        self.base.wrapping_add(index.wrapping_mul(self.scale)) & self.mask
    }
}

/// Completed elements stay when a later one faults: their mask elements are clear then.
fn gather(core: &mut Core, insn: &Instruction, index_size: usize, size: usize, count: usize) -> Result<()> {
    let (to, index, by) = (insn.op0_register(), insn.memory_index(), insn.op2_register());
    let numbers = [to.number(), index.number(), by.number()];
    if numbers[0] == numbers[1] || numbers[0] == numbers[2] || numbers[1] == numbers[2] {
        return Err(Trap::ud());
    }
    avx(core)?;
    let place = Indexed::of(core, insn);
    let indices = vec(core, index);
    let mut result = vec(core, to);
    let mut mask = [0u8; 64];
    let old_mask = vec(core, by);
    for n in 0..count {
        if chosen(&old_mask, n, size) {
            put(&mut mask, n, size, u64::MAX);
        }
    }
    for n in 0..count {
        if !chosen(&mask, n, size) {
            continue;
        }
        let offset = place.element(sign_extend(get(&indices, n, index_size), index_size));
        match core.linear(place.segment, offset, size, false).and_then(|linear| load(core, linear, size)) {
            Ok(value) => {
                put(&mut result, n, size, value);
                put(&mut mask, n, size, 0);
            }
            Err(trap) => {
                // A question to the machine runs the instruction again from its start.
                if matches!(trap, Trap::Exception(_)) {
                    if (0..n).any(|n| chosen(&old_mask, n, size)) {
                        result[to.size().max(index.size())..].fill(0);
                    }
                    set_vec(core, to, result);
                    set_vec(core, by, mask);
                }
                return Err(trap);
            }
        }
    }
    result[count * size..].fill(0);
    set_vec(core, to, result);
    set_vec(core, by, [0; 64]);
    advance(core, insn);
    Ok(())
}

/// Linear address of element `n` of a memory operand.
fn element(core: &mut Core, insn: &Instruction, n: usize, size: usize, write: bool) -> Result<u64> {
    let mask = size_mask(crate::access::address_size(insn, core.is_64bit()));
    let offset = core.operand_offset(insn).wrapping_add((n * size) as u64) & mask;
    core.linear(operand_segment(insn, core.is_64bit()), offset, size, write)
}

fn masked_load(core: &mut Core, insn: &Instruction, size: usize, count: usize) -> Result<()> {
    avx(core)?;
    let mask = vec(core, insn.op1_register());
    let mut result = [0u8; 64];
    for n in (0..count).filter(|n| chosen(&mask, *n, size)) {
        let linear = element(core, insn, n, size, false)?;
        let mut bytes = [0u8; 8];
        core.read(linear, &mut bytes[..size], Privilege::Current)?;
        put(&mut result, n, size, u64::from_le_bytes(bytes));
    }
    set_vec(core, insn.op0_register(), result);
    advance(core, insn);
    Ok(())
}

fn masked_store(core: &mut Core, insn: &Instruction, size: usize, count: usize) -> Result<()> {
    avx(core)?;
    let mask = vec(core, insn.op1_register());
    let data = vec(core, insn.op2_register());
    let mut places = [0u64; 8];
    for n in (0..count).filter(|n| chosen(&mask, *n, size)) {
        places[n] = element(core, insn, n, size, true)?;
        core.probe_write(places[n], size, Privilege::Current)?;
    }
    for n in (0..count).filter(|n| chosen(&mask, *n, size)) {
        let bytes = get(&data, n, size).to_le_bytes();
        core.write(places[n], &bytes[..size], Privilege::Current)?;
    }
    advance(core, insn);
    Ok(())
}

/// Stores the bytes of `data` whose byte of `mask` has its high bit set, at DS:rDI.
fn store_bytes(core: &mut Core, insn: &Instruction, data: &[u8], mask: &[u8]) -> Result<()> {
    let wrap = size_mask(address_bytes(insn));
    let start = core.gpr(RDI);
    let segment = operand_segment(insn, core.is_64bit());
    let mut places = [0u64; 16];
    let picked = |n: &usize| mask[*n] & 0x80 != 0;
    for n in (0..data.len()).filter(picked) {
        places[n] = core.linear(segment, start.wrapping_add(n as u64) & wrap, 1, true)?;
        probe(core, places[n], 1)?;
    }
    for n in (0..data.len()).filter(picked) {
        store(core, places[n], 1, u64::from(data[n]))?;
    }
    Ok(())
}

fn mask_bytes(core: &mut Core, insn: &Instruction) -> Result<()> {
    if insn.code() == Code::VEX_Vmaskmovdqu_rDI_xmm_xmm {
        avx(core)?;
    } else {
        if core.sys.cr0 & cr0::EM != 0 || core.sys.cr4 & cr4::OSFXSR == 0 {
            return Err(Trap::ud());
        }
        if core.sys.cr0 & cr0::TS != 0 {
            return Err(Trap::nm());
        }
    }
    let data = vec(core, insn.op1_register());
    let mask = vec(core, insn.op2_register());
    store_bytes(core, insn, &data[..16], &mask[..16])?;
    advance(core, insn);
    Ok(())
}

/// MASKMOVQ also puts the x87 registers into MMX use: all valid, TOP 0 (SDM vol. 1, 9.5.1).
fn mask_mmx(core: &mut Core, insn: &Instruction) -> Result<()> {
    if core.sys.cr0 & cr0::EM != 0 {
        return Err(Trap::ud());
    }
    if core.sys.cr0 & cr0::TS != 0 {
        return Err(Trap::nm());
    }
    crate::fpu::store(core);
    let image = &core.c().xsave;
    let (status, top) = (u16::from_le_bytes([image[2], image[3]]), usize::from(image[3] >> 3 & 7));
    if status & 0x80 != 0 && core.sys.cr0 & cr0::NE != 0 {
        return Err(Trap::vector(vector::MF));
    }
    let mmx = |register: Register| {
        let at = 32 + 16 * ((register.number() + 8 - top) & 7);
        let mut out = [0u8; 8];
        out.copy_from_slice(&image[at..at + 8]);
        out
    };
    let (data, mask) = (mmx(insn.op1_register()), mmx(insn.op2_register()));
    store_bytes(core, insn, &data, &mask)?;
    let image = &mut core.ctx.get_mut().xsave;
    image[32..160].rotate_right(16 * top);
    image[3] &= !0x38;
    image[4] = 0xff;
    image[512] |= 1;
    crate::fpu::load(core);
    advance(core, insn);
    Ok(())
}
