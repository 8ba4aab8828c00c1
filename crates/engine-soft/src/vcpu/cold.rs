//! What translation costs where nothing is translated yet: the look into the book, the fetch, decoding, liveness,
//! emission, registration, and the page faults of fresh code memory. For `benches/cold.rs`.

use std::sync::Arc;

use iced_x86::{Decoder, DecoderOptions};
use wardian_cpu::bits::{cr0, cr4, efer};
use wardian_cpu::{CpuModel, CpuState, EngineError, Segment, Vcpu};
use wardian_irq::Quiet;
use wardian_memory::{Gpa, GuestMemory};
use wardian_time::{Nanos, TimeBase, host_ticks, ticks_to_nanos};

use super::SoftVcpu;
use crate::{Options, SoftEngine};

/// Where the text lies.
const BASE: u64 = 2 << 20;

/// What it cost.
#[derive(Clone, Copy, Debug)]
pub struct Cold {
    pub instructions: u64,
    pub blocks: u64,
    pub code_bytes: u64,
    pub took: Nanos,
}

/// Translates all of `text` as 64-bit user code, block after block, with a fresh processor.
///
/// # Errors
/// When the host cannot run the engine, or has not enough memory.
pub fn measure(text: &[u8]) -> Result<Cold, EngineError> {
    // A first processor only says where blocks begin.
    let mut starts = Vec::new();
    let mut scout = processor(text)?;
    let mut at = 0;
    while at < text.len() {
        let before = scout.core.counters.translated_instructions;
        if !scout.translate_at(BASE + at as u64) {
            break;
        }
        starts.push(BASE + at as u64);
        let count = scout.core.counters.translated_instructions - before;
        let mut decoder = Decoder::new(64, &text[at..], DecoderOptions::NONE);
        for _ in 0..count {
            let _ = decoder.decode();
        }
        at += decoder.position().max(1);
    }
    drop(scout);
    let mut vcpu = processor(text)?;
    let begun = host_ticks();
    for start in starts {
        vcpu.translate_at(start);
    }
    let took = ticks_to_nanos(host_ticks().wrapping_sub(begun));
    let counters = &vcpu.core.counters;
    Ok(Cold {
        instructions: counters.translated_instructions,
        blocks: counters.translations,
        code_bytes: u64::from(vcpu.translator.used()),
        took,
    })
}

/// A processor at CPL 3 of 64-bit mode with the first GiB mapped to itself.
fn processor(text: &[u8]) -> Result<SoftVcpu, EngineError> {
    let size = (BASE + text.len() as u64).next_multiple_of(2 << 20) + (2 << 20);
    let failed = |error: &dyn std::fmt::Display| EngineError::Host(error.to_string());
    let mem = GuestMemory::new(size).map_err(|error| failed(&error))?;
    let write = |at, bytes: &[u8]| mem.write(Gpa(at), bytes).map_err(|error| failed(&error));
    write(BASE, text)?;
    write(0x1000, &0x2007u64.to_le_bytes())?;
    write(0x2000, &0x3007u64.to_le_bytes())?;
    for n in 0..512u64 {
        write(0x3000 + n * 8, &(n << 21 | 0x87).to_le_bytes())?;
    }
    let time = TimeBase::manual(Nanos(0));
    let model = CpuModel::host("host", &SoftEngine::offer(&time)).map_err(|error| failed(&error))?;
    let engine = SoftEngine::new(mem, time, &Options { cpus: 1 })?;
    let mut vcpu = engine.vcpu(0, &Arc::new(model), Arc::new(Quiet))?;
    let mut state = CpuState::reset();
    state.segments = [Segment { selector: 0x13, base: 0, limit: u32::MAX, rights: 0xc0f3 }; 6];
    state.segments[CpuState::CS] = Segment { selector: 0xb, base: 0, limit: u32::MAX, rights: 0xa0fb };
    state.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    state.xcr0 = 7;
    state.cr3 = 0x1000;
    state.efer = efer::LME | efer::LMA | efer::NXE;
    state.rip = BASE;
    vcpu.set_state(&state)?;
    Ok(vcpu)
}

impl SoftVcpu {
    /// Finds or makes the block at `linear`.
    fn translate_at(&mut self, linear: u64) -> bool {
        self.core.set_rip(linear);
        self.block().is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_a_text() {
        // add rax, rbx; ret; jne +0; nop; ret
        let cold = measure(&[0x48, 0x01, 0xd8, 0xc3, 0x75, 0x00, 0x90, 0xc3]).unwrap();
        assert_eq!((cold.instructions, cold.blocks), (5, 2));
        assert!(cold.code_bytes > 0);
    }
}
