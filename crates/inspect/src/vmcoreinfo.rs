//! VMCOREINFO: the page that Linux keeps for those who read its memory after a crash
//! (Linux, Documentation/admin-guide/kdump/vmcoreinfo.rst). Lines of `KEY=VALUE`.

use std::collections::HashMap;

use crate::Physical;

/// What the page says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmCoreInfo {
    values: HashMap<String, String>,
}

const HEAD: &[u8] = b"OSRELEASE=";
const PAGE: usize = 4096;
/// Pages that begin likewise are compared: more than so many are no accident.
const MAX_CANDIDATES: usize = 64;

impl VmCoreInfo {
    /// Takes a page apart; `None` if it is not one.
    #[must_use]
    pub fn parse(page: &[u8]) -> Option<VmCoreInfo> {
        let page = &page[..page.len().min(PAGE)];
        let text = &page[..page.iter().position(|byte| *byte == 0).unwrap_or(page.len())];
        if !text.starts_with(HEAD) {
            return None;
        }
        let text = String::from_utf8_lossy(text);
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        let values: HashMap<String, String> = pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        // A copy of the first line alone is something else.
        (values.len() >= 8).then_some(VmCoreInfo { values })
    }

    /// Every page of RAM that looks like one.
    pub fn find(memory: &dyn Physical) -> Vec<VmCoreInfo> {
        let mut found = Vec::new();
        let mut page = vec![0; PAGE];
        for range in memory.data() {
            let mut at = range.start.next_multiple_of(PAGE as u64);
            while at < range.end && found.len() < MAX_CANDIDATES {
                let mut head = [0; HEAD.len()];
                if memory.read(at, &mut head) && head == HEAD && memory.read(at, &mut page) {
                    found.extend(VmCoreInfo::parse(&page));
                }
                at += PAGE as u64;
            }
        }
        found
    }

    /// Release of the kernel, as uname(1) has it.
    #[must_use]
    pub fn release(&self) -> Option<&str> {
        self.values.get("OSRELEASE").map(String::as_str)
    }

    /// Build-id of the kernel.
    #[must_use]
    pub fn build_id(&self) -> Option<Vec<u8>> {
        let text = self.values.get("BUILD-ID")?;
        (text.len() % 2 == 0 && text.is_ascii() && text.len() <= 64).then_some(())?;
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
    }

    fn hex(&self, key: &str) -> Option<u64> {
        u64::from_str_radix(self.values.get(key)?.trim_start_matches("0x"), 16).ok()
    }

    fn decimal(&self, key: &str) -> Option<u64> {
        self.values.get(key)?.parse().ok()
    }

    /// By how much the kernel was moved.
    #[must_use]
    pub fn slide(&self) -> Option<u64> {
        self.hex("KERNELOFFSET")
    }

    /// Address of a symbol.
    #[must_use]
    pub fn symbol(&self, name: &str) -> Option<u64> {
        self.hex(&format!("SYMBOL({name})"))
    }

    /// Offset of a field, as `structure.field`.
    #[must_use]
    pub fn offset(&self, field: &str) -> Option<u64> {
        self.decimal(&format!("OFFSET({field})"))
    }

    /// Size of a structure.
    #[must_use]
    pub fn size(&self, name: &str) -> Option<u64> {
        self.decimal(&format!("SIZE({name})"))
    }
}

#[cfg(test)]
mod tests {
    use super::VmCoreInfo;

    #[test]
    fn a_page_is_found_and_taken_apart() {
        let text = "OSRELEASE=6.1.0\nBUILD-ID=0aff\nPAGESIZE=4096\nSYMBOL(_stext)=ffffffff81000000\n\
            OFFSET(list_head.next)=0\nSIZE(page)=64\nKERNELOFFSET=1a000000\nA=B\n";
        let mut memory = vec![0u8; 5 * 4096];
        memory[2 * 4096..2 * 4096 + text.len()].copy_from_slice(text.as_bytes());
        memory[100..110].copy_from_slice(b"OSRELEASE=");
        memory[4096..4106].copy_from_slice(b"OSRELEASE=");
        let found = VmCoreInfo::find(&memory);
        let [info] = &found[..] else { panic!("{found:?}") };
        assert_eq!(info.release(), Some("6.1.0"));
        assert_eq!(info.build_id(), Some(vec![0x0a, 0xff]));
        assert_eq!(info.symbol("_stext"), Some(0xffff_ffff_8100_0000));
        assert_eq!(info.slide(), Some(0x1a00_0000));
        assert_eq!((info.offset("list_head.next"), info.size("page")), (Some(0), Some(64)));
        assert_eq!(info.size("_stext"), None);
    }

    #[test]
    fn nonsense_is_refused() {
        assert_eq!(VmCoreInfo::parse(b"OSRELEASE=\xff\xff"), None);
        assert_eq!(VmCoreInfo::parse(&[]), None);
    }
}
