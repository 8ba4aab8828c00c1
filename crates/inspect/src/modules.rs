//! Kernel modules and their names.

use std::collections::HashSet;
use std::sync::{Arc, PoisonError};

use serde::Serialize;

use crate::kernel::KERNEL_HALF;
use crate::orc::Orc;
use crate::{Symbols, View};

const MAX_MODULES: usize = 4096;
/// MODULE_NAME_LEN.
const NAME: usize = 64 - 8;
const MAX_SYMBOLS: u32 = 1 << 18;
/// Entries of the unwinding table of one module.
const MAX_ORC: u32 = 1 << 18;
/// Names and entries of all modules together.
const MAX_ALL_ENTRIES: usize = 2 << 20;
const MAX_NAME: usize = 512;
const MAX_SIZE: u64 = 256 << 20;
/// `MODULE_STATE_LIVE` and `MODULE_STATE_GOING`; others are not whole yet.
const LIVE: u32 = 0;
const GOING: u32 = 2;
/// Kinds of module memory (Linux, include/linux/module.h): text, data, read-only data, read-only after init.
const KINDS: u64 = 4;
const ELF_SYMBOL: u64 = 24;

/// A module of the kernel.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Module {
    /// Address of its `struct module`.
    #[serde(skip)]
    pub address: u64,
    /// Name.
    pub name: String,
    /// Where its code begins.
    pub text: u64,
    /// Bytes of code.
    pub text_size: u64,
    /// Bytes in all.
    pub size: u64,
    /// Build-id; empty if it is not known.
    pub build_id: Vec<u8>,
    /// Its names.
    #[serde(skip)]
    pub symbols: Symbols,
    #[serde(skip)]
    pub(crate) orc: Option<Orc>,
}

impl Module {
    /// Names and unwinding entries that are kept of it.
    fn entries(&self) -> usize {
        self.symbols.len() + self.orc.as_ref().map_or(0, Orc::len)
    }

    /// Whether its code holds `address`.
    #[must_use]
    pub fn holds(&self, address: u64) -> bool {
        address.wrapping_sub(self.text) < self.text_size
    }
}

impl View<'_> {
    pub(crate) fn read_modules(&self) -> Vec<Arc<Module>> {
        let layout = &self.kernel.layout.modules;
        let mut all = Vec::new();
        let (Some(head), Some(list)) = (self.kernel.symbols().address("modules"), layout.list) else {
            return all;
        };
        let mut seen = HashSet::from([head]);
        let mut at = self.space.u64(head);
        while let Some(place) = at.filter(|at| all.len() < MAX_MODULES && seen.insert(*at)) {
            all.extend(self.module(place.wrapping_sub(list)));
            at = self.space.u64(place);
        }
        // What is gone is forgotten.
        let mut known = self.kernel.modules.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|address, _| all.iter().any(|module| module.address == *address));
        all
    }

    fn module(&self, at: u64) -> Option<Arc<Module>> {
        let layout = &self.kernel.layout.modules;
        let word = |offset: Option<u64>| self.space.u64(at.checked_add(offset?)?);
        let state = self.space.u32(at.checked_add(layout.state?)?)?;
        if at < KERNEL_HALF || !matches!(state, LIVE | GOING) {
            return None;
        }
        let name = self.space.text(at.checked_add(layout.name?)?, NAME)?;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if name.is_empty() || !name.chars().all(plain) {
            return None;
        }
        let (text, text_size, size) = match (layout.memory, self.kernel.layout.module_memory_size) {
            (Some(memory), Some(step)) => {
                let piece = |kind: u64| {
                    let place = at.checked_add(memory)?.checked_add(kind * step)?;
                    let base = self.space.u64(place.checked_add(layout.memory_base?)?)?;
                    Some((base, u64::from(self.space.u32(place.checked_add(layout.memory_size?)?)?)))
                };
                let (base, bytes) = piece(0)?;
                (base, bytes, (0..KINDS).filter_map(piece).map(|(_, bytes)| bytes).sum())
            }
            _ => {
                let bytes = |offset: Option<u64>| Some(u64::from(self.space.u32(at.checked_add(offset?)?)?));
                (word(layout.core_base)?, bytes(layout.core_text)?, bytes(layout.core_size)?)
            }
        };
        if text < KERNEL_HALF || text_size > MAX_SIZE || size > MAX_SIZE {
            return None;
        }
        let room = {
            let known = self.kernel.modules.lock().unwrap_or_else(PoisonError::into_inner);
            let same = |module: &&Arc<Module>| module.name == name && module.text == text;
            if let Some(module) = known.get(&at).filter(same) {
                return Some(Arc::clone(module));
            }
            known.values().map(|module| module.entries()).sum::<usize>() < MAX_ALL_ENTRIES
        };
        let build_id = layout.build_id.and_then(|offset| self.space.bytes(at.wrapping_add(offset), 20, 20));
        let module = Arc::new(Module {
            address: at,
            symbols: if room { self.module_symbols(at).unwrap_or_default() } else { Symbols::default() },
            orc: if room { self.module_orc(at) } else { None },
            build_id: build_id.filter(|id| id.iter().any(|byte| *byte != 0)).unwrap_or_default(),
            name,
            text,
            text_size,
            size,
        });
        let mut known = self.kernel.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() < MAX_MODULES {
            known.insert(at, Arc::clone(&module));
        }
        Some(module)
    }

    fn module_symbols(&self, at: u64) -> Option<Symbols> {
        let (layout, memory) = (&self.kernel.layout.modules, &self.space);
        let tables = memory.u64(at.checked_add(layout.kallsyms?)?)?;
        let word = |offset: Option<u64>| memory.u64(tables.checked_add(offset?)?);
        let (table, text) = (word(layout.table)?, word(layout.table_text)?);
        let kinds = word(layout.table_kinds);
        let count = memory.u32(tables.checked_add(layout.table_count?)?)?;
        if count > MAX_SYMBOLS {
            return None;
        }
        let size = u64::from(count) * ELF_SYMBOL;
        let entries = memory.bytes(table, size, size as usize)?;
        let mut symbols = Symbols::default();
        for (index, entry) in entries.as_chunks::<{ ELF_SYMBOL as usize }>().0.iter().enumerate() {
            let name = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
            let value = u64::from_le_bytes(entry[8..16].try_into().ok()?);
            let undefined = entry[6] == 0 && entry[7] == 0;
            let Some(name) = memory.text(text.checked_add(u64::from(name))?, MAX_NAME) else { continue };
            if undefined || name.is_empty() {
                continue;
            }
            // Until 5.15 or so the kind is in st_size; then there is a table. The type says enough.
            let kind = kinds.and_then(|kinds| memory.u8(kinds.checked_add(index as u64)?));
            let guess = if entry[4] & 15 == 2 { b't' } else { b'd' };
            symbols.add(value, kind.filter(u8::is_ascii_alphabetic).unwrap_or(guess), &name);
        }
        symbols.finish();
        Some(symbols)
    }

    fn module_orc(&self, at: u64) -> Option<Orc> {
        let layout = &self.kernel.layout.modules;
        let word = |offset: Option<u64>| self.space.u64(at.checked_add(offset?)?);
        let count = self.space.u32(at.checked_add(layout.orc_count?)?)?;
        if count > MAX_ORC {
            return None;
        }
        // The few entries of a module do not tell their form; those of the kernel do.
        Orc::read(
            &self.space,
            word(layout.orc_places)?,
            word(layout.orc_entries)?,
            u64::from(count),
            Ok(self.orc_form()?),
        )
    }
}
