//! Random encodings of a given [`Code`], made byte by byte so that forms that no assembler emits occur as well:
//! redundant prefixes, ignored bits, needless SIB bytes and displacements. The decoder has the last word on what was
//! made.

use iced_x86::{
    Code, Decoder, DecoderOptions, EncodingKind, Instruction, MandatoryPrefix, OpCodeInfo,
    OpCodeOperandKind as K, OpCodeTableKind,
};

use crate::rng::Rng;

/// How memory operands are to be made.
#[derive(Clone, Copy, Debug)]
pub enum Addressing {
    /// In any way.
    Any,
    /// From this base register with a small displacement, perhaps with this index register.
    Fixed {
        /// Base register number.
        base: u8,
        /// Index register number (not 4).
        index: u8,
    },
}

/// What is fixed about an encoding before it is made.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// 64 or 32.
    pub bitness: u32,
    /// Linear address of the instruction.
    pub address: u64,
    /// How memory operands are made.
    pub addressing: Addressing,
    /// Whether segment overrides and address-size prefixes may be put in.
    pub prefixes: bool,
}

fn needs_modrm(info: &OpCodeInfo) -> bool {
    if info.is_group() || info.is_rm_group() || info.ignores_mod_bits() {
        return true;
    }
    info.op_kinds().iter().any(|kind| {
        !matches!(
            kind,
            K::None
                | K::mem_offs
                | K::r8_opcode
                | K::r16_opcode
                | K::r32_opcode
                | K::r64_opcode
                | K::es
                | K::cs
                | K::ss
                | K::ds
                | K::fs
                | K::gs
                | K::al
                | K::cl
                | K::ax
                | K::dx
                | K::eax
                | K::rax
                | K::st0
                | K::sti_opcode
                | K::imm4_m2z
                | K::imm8
                | K::imm8_const_1
                | K::imm8sex16
                | K::imm8sex32
                | K::imm8sex64
                | K::imm16
                | K::imm32
                | K::imm32sex64
                | K::imm64
                | K::seg_rSI
                | K::es_rDI
                | K::seg_rDI
                | K::seg_rBX_al
                | K::br16_1
                | K::br32_1
                | K::br64_1
                | K::br16_2
                | K::br32_4
                | K::br64_4
                | K::farbr2_2
                | K::farbr4_2
        )
    })
}

fn in_opcode(kind: K) -> bool {
    matches!(kind, K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode | K::sti_opcode)
}

fn in_vvvv(kind: K) -> bool {
    matches!(
        kind,
        K::r32_vvvv
            | K::r64_vvvv
            | K::k_vvvv
            | K::xmm_vvvv
            | K::ymm_vvvv
            | K::zmm_vvvv
            | K::xmmp3_vvvv
            | K::zmmp3_vvvv
    )
}

fn only_memory(info: &OpCodeInfo) -> bool {
    info.op_kinds().iter().any(|kind| {
        matches!(
            kind,
            K::mem
                | K::mem_mib
                | K::mem_vsib32x
                | K::mem_vsib64x
                | K::mem_vsib32y
                | K::mem_vsib64y
                | K::mem_vsib32z
                | K::mem_vsib64z
        )
    })
}

fn is_vsib(info: &OpCodeInfo) -> bool {
    only_memory(info) && !info.op_kinds().iter().any(|kind| matches!(kind, K::mem | K::mem_mib))
}

fn may_be_memory(info: &OpCodeInfo) -> bool {
    only_memory(info)
        || info.op_kinds().iter().any(|kind| {
            matches!(
                kind,
                K::r8_or_mem
                    | K::r16_or_mem
                    | K::r32_or_mem
                    | K::r64_or_mem
                    | K::mm_or_mem
                    | K::xmm_or_mem
                    | K::ymm_or_mem
                    | K::zmm_or_mem
                    | K::k_or_mem
            )
        })
}

/// ModRM, SIB and displacement, and the three extension bits they want (R, X, B).
struct Modrm {
    bytes: Vec<u8>,
    r: u8,
    x: u8,
    b: u8,
}

fn modrm(rng: &mut Rng, info: &OpCodeInfo, plan: &Plan, memory: bool, address16: bool) -> Modrm {
    let reg = if info.is_group() { info.group_index() as u8 } else { rng.below(8) as u8 };
    let mut out =
        Modrm { bytes: Vec::new(), r: rng.below(2) as u8, x: rng.below(2) as u8, b: rng.below(2) as u8 };
    if !memory {
        let rm = if info.is_rm_group() { info.rm_group_index() as u8 } else { rng.below(8) as u8 };
        let mode = if info.ignores_mod_bits() { rng.below(4) as u8 } else { 3 };
        out.bytes.push(mode << 6 | reg << 3 | rm);
        return out;
    }
    let small = |rng: &mut Rng| (rng.below(0x400) as i32 - 0x200).to_le_bytes();
    if let Addressing::Fixed { base, index } = plan.addressing {
        out.b = base >> 3;
        let mode = if base & 7 == 5 { 1 + rng.below(2) } else { rng.below(3) } as u8;
        let sib = base & 7 == 4 || is_vsib(info) || rng.chance(35);
        if sib {
            let with_index = rng.chance(60);
            out.x = if with_index { index >> 3 } else { 0 };
            let low = if with_index { index & 7 } else { 4 };
            out.bytes.extend([mode << 6 | reg << 3 | 4, (rng.below(4) as u8) << 6 | low << 3 | base & 7]);
        } else {
            out.bytes.push(mode << 6 | reg << 3 | base & 7);
        }
        match mode {
            1 => out.bytes.push(rng.any() as u8),
            2 => out.bytes.extend(small(rng)),
            _ => {}
        }
        return out;
    }
    let mode = rng.below(3) as u8;
    if address16 {
        let rm = rng.below(8) as u8;
        out.bytes.push(mode << 6 | reg << 3 | rm);
        match (mode, rm) {
            (1, _) => out.bytes.push(rng.any() as u8),
            (2, _) | (0, 6) => out.bytes.extend((rng.any() as u16).to_le_bytes()),
            _ => {}
        }
        return out;
    }
    let rm = if is_vsib(info) || rng.chance(30) { 4 } else { rng.below(8) as u8 };
    out.bytes.push(mode << 6 | reg << 3 | rm);
    let mut base = rm;
    if rm == 4 {
        base = rng.below(8) as u8;
        out.bytes.push((rng.below(4) as u8) << 6 | (rng.below(8) as u8) << 3 | base);
    }
    match mode {
        0 if base == 5 => out.bytes.extend(small(rng)),
        1 => out.bytes.push(rng.any() as u8),
        2 if rng.chance(20) => out.bytes.extend((rng.any() as u32).to_le_bytes()),
        2 => out.bytes.extend(small(rng)),
        _ => {}
    }
    out
}

fn immediate(rng: &mut Rng, info: &OpCodeInfo, plan: &Plan, out: &mut Vec<u8>) {
    let mut is4 = None;
    for kind in info.op_kinds() {
        let value = rng.integer();
        match kind {
            K::imm8 | K::imm8sex16 | K::imm8sex32 | K::imm8sex64 => out.push(value as u8),
            K::imm16 => out.extend((value as u16).to_le_bytes()),
            K::imm32 | K::imm32sex64 => out.extend((value as u32).to_le_bytes()),
            K::imm64 => out.extend(value.to_le_bytes()),
            K::mem_offs if plan.bitness == 64 => out.extend((rng.any() & 0xff).to_le_bytes()),
            K::mem_offs => out.extend((rng.any() as u32 & 0xff).to_le_bytes()),
            K::xmm_is4 | K::ymm_is4 | K::xmm_is5 | K::ymm_is5 => is4 = Some((value as u8) & 0xf0),
            K::imm4_m2z => is4 = is4.map(|byte| byte | (value as u8 & 15)),
            K::br16_2 => out.extend((value as u16).to_le_bytes()),
            K::br16_1 | K::br32_1 | K::br64_1 => out.push(value as u8),
            K::br32_4 | K::br64_4 => out.extend((rng.below(0x100) as i32 - 0x80).to_le_bytes()),
            _ => {}
        }
    }
    out.extend(is4);
}

fn simd_prefix(info: &OpCodeInfo) -> u8 {
    match info.mandatory_prefix() {
        MandatoryPrefix::P66 => 1,
        MandatoryPrefix::PF3 => 2,
        MandatoryPrefix::PF2 => 3,
        _ => 0,
    }
}

fn map_of(info: &OpCodeInfo) -> u8 {
    match info.table() {
        OpCodeTableKind::T0F => 1,
        OpCodeTableKind::T0F38 => 2,
        OpCodeTableKind::T0F3A => 3,
        OpCodeTableKind::MAP5 => 5,
        OpCodeTableKind::MAP6 => 6,
        _ => 0,
    }
}

/// One attempt at an encoding of `code`.
fn attempt(rng: &mut Rng, code: Code, plan: &Plan) -> Vec<u8> {
    let info = code.op_code();
    let long = plan.bitness == 64;
    let mut out = Vec::with_capacity(16);
    let with_modrm = needs_modrm(info);
    let memory =
        with_modrm && may_be_memory(info) && !info.is_rm_group() && (only_memory(info) || rng.chance(60));
    let free = plan.prefixes && matches!(plan.addressing, Addressing::Any);
    let prefixed = |percent: u64, rng: &mut Rng| free && rng.chance(percent);
    if prefixed(10, rng) {
        out.push(rng.pick(&[0x64, 0x65, 0x64, 0x65, 0x3e, 0x2e, 0x26, 0x36]));
    }
    let natural = if long { 64 } else { 32 };
    let address_prefix = match info.address_size() {
        0 => prefixed(8, rng),
        size => size != natural,
    };
    if address_prefix {
        out.push(0x67);
    }
    let address16 = address_prefix && !long;
    let part = if with_modrm {
        modrm(rng, info, plan, memory, address16)
    } else {
        Modrm { bytes: Vec::new(), r: 0, x: 0, b: rng.below(2) as u8 }
    };
    let vvvv = if info.op_kinds().iter().any(|kind| in_vvvv(*kind)) {
        rng.below(if long { 16 } else { 8 }) as u8
    } else {
        0
    };
    let (r, x, b) = if long { (part.r, part.x, part.b) } else { (0, 0, 0) };
    let low = if info.op_kinds().iter().any(|kind| in_opcode(*kind)) { rng.below(8) as u8 } else { 0 };
    let opcode = |out: &mut Vec<u8>| {
        let bytes = info.op_code().to_be_bytes();
        out.extend(&bytes[4 - info.op_code_len() as usize..]);
        if let Some(last) = out.last_mut() {
            *last |= low;
        }
    };
    let wide = if info.is_wig() { rng.below(2) as u8 } else { info.w() as u8 };
    match code.encoding() {
        EncodingKind::Legacy => {
            legacy_prefixes(rng, info, plan, memory, &mut out);
            if long {
                let w = match info.operand_size() {
                    64 if !info.default_op_size64() => 1,
                    _ => u8::from(rng.chance(10)),
                };
                let rex = 0x40 | w << 3 | r << 2 | x << 1 | b;
                if rex != 0x40 || rng.chance(30) {
                    out.push(rex);
                }
            }
            match info.table() {
                OpCodeTableKind::T0F => out.push(0x0f),
                OpCodeTableKind::T0F38 => out.extend([0x0f, 0x38]),
                OpCodeTableKind::T0F3A => out.extend([0x0f, 0x3a]),
                _ => {}
            }
            opcode(&mut out);
        }
        EncodingKind::VEX => {
            let l = if info.is_lig() { rng.below(2) } else { u64::from(info.l()) } as u8;
            let tail = (!vvvv & 15) << 3 | l << 2 | simd_prefix(info);
            let map = map_of(info);
            if map == 1 && wide == 0 && x == 0 && b == 0 && rng.chance(80) {
                out.extend([0xc5, (r ^ 1) << 7 | tail]);
            } else {
                out.extend([0xc4, (r ^ 1) << 7 | (x ^ 1) << 6 | (b ^ 1) << 5 | map, wide << 7 | tail]);
            }
            opcode(&mut out);
        }
        EncodingKind::EVEX => {
            let high = |rng: &mut Rng| if long { rng.below(2) as u8 } else { 0 };
            let (r_high, v_high) = (high(rng), high(rng));
            let mut l = if info.is_lig() { rng.below(3) } else { u64::from(info.l()) } as u8;
            let broadcast = if memory {
                info.can_broadcast() && rng.chance(30)
            } else {
                (info.can_use_rounding_control() || info.can_suppress_all_exceptions()) && rng.chance(30)
            };
            if broadcast && !memory && info.can_use_rounding_control() {
                l = rng.below(4) as u8;
            }
            let masked = info.require_op_mask_register() || info.can_use_op_mask_register() && rng.chance(60);
            let mask = if masked { 1 + rng.below(7) as u8 } else { 0 };
            let zeroing = u8::from(masked && info.can_use_zeroing_masking() && rng.chance(40));
            let vvvv_used = info.op_kinds().iter().any(|kind| in_vvvv(*kind)) || is_vsib(info);
            let v_high = if vvvv_used { v_high } else { 0 };
            out.extend([
                0x62,
                (r ^ 1) << 7 | (x ^ 1) << 6 | (b ^ 1) << 5 | (r_high ^ 1) << 4 | map_of(info),
                wide << 7 | (!vvvv & 15) << 3 | 4 | simd_prefix(info),
                zeroing << 7 | l << 5 | u8::from(broadcast) << 4 | (v_high ^ 1) << 3 | mask,
            ]);
            opcode(&mut out);
        }
        _ => {}
    }
    out.extend(part.bytes);
    immediate(rng, info, plan, &mut out);
    out
}

fn legacy_prefixes(rng: &mut Rng, info: &OpCodeInfo, plan: &Plan, memory: bool, out: &mut Vec<u8>) {
    match info.mandatory_prefix() {
        MandatoryPrefix::P66 => out.push(0x66),
        MandatoryPrefix::PF3 => out.push(0xf3),
        MandatoryPrefix::PF2 => out.push(0xf2),
        _ => {}
    }
    if info.operand_size() == 16 {
        out.push(0x66);
    } else if plan.prefixes && info.operand_size() == 0 && rng.chance(2) {
        out.push(0x66); // redundant or fatal: the decoder tells
    }
    if info.can_use_lock_prefix() && memory && rng.chance(40) {
        out.push(0xf0);
    }
    if info.can_use_rep_prefix() && rng.chance(60) {
        out.push(0xf3);
    } else if info.can_use_repne_prefix() && rng.chance(40) {
        out.push(0xf2);
    }
}

/// A random encoding of `code` and what it decodes to; `None` when none was found.
pub fn encode(rng: &mut Rng, code: Code, plan: &Plan) -> Option<(Vec<u8>, Instruction)> {
    for _ in 0..24 {
        let bytes = attempt(rng, code, plan);
        if let Some(instruction) = decode(&bytes, plan.bitness, plan.address)
            && instruction.code() == code
        {
            return Some((bytes, instruction));
        }
    }
    None
}

/// Decodes exactly `bytes`.
#[must_use]
pub fn decode(bytes: &[u8], bitness: u32, address: u64) -> Option<Instruction> {
    let mut decoder = Decoder::with_ip(bitness, bytes, address, DecoderOptions::NONE);
    let instruction = decoder.decode();
    (!instruction.is_invalid() && decoder.position() == bytes.len()).then_some(instruction)
}
