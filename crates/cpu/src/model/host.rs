//! [`HostCpuid`]: what the CPUID instruction says, as a value, so that models can be made and tested anywhere.

use std::collections::BTreeMap;

/// CPUID answers by leaf and subleaf; what is not there reads as zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostCpuid(BTreeMap<(u32, u32), [u32; 4]>);

impl HostCpuid {
    /// The answers of the processor that this runs on.
    #[must_use]
    pub fn read() -> HostCpuid {
        let mut all = BTreeMap::new();
        let mut ask = |leaf: u32, subleaf: u32| {
            let answer = core::arch::x86_64::__cpuid_count(leaf, subleaf);
            let answer = [answer.eax, answer.ebx, answer.ecx, answer.edx];
            all.insert((leaf, subleaf), answer);
            answer
        };
        let last = ask(0, 0)[0];
        for leaf in (1..=last.min(0x24)).filter(|leaf| matches!(leaf, 1 | 2 | 4 | 6 | 7 | 0xd | 0x15 | 0x16))
        {
            ask(leaf, 0);
            let more = match leaf {
                4 => 1..8,
                7 => 1..2,
                0xd => 1..20,
                _ => 0..0,
            };
            for subleaf in more {
                ask(leaf, subleaf);
            }
        }
        let last = ask(0x8000_0000, 0)[0];
        for leaf in 0x8000_0001..=last.clamp(0x8000_0000, 0x8000_0021) {
            ask(leaf, 0);
            if leaf == 0x8000_001d {
                for subleaf in 1..8 {
                    ask(leaf, subleaf);
                }
            }
        }
        HostCpuid(all)
    }

    /// The answers given.
    #[must_use]
    pub fn from_answers(answers: impl IntoIterator<Item = ((u32, u32), [u32; 4])>) -> HostCpuid {
        HostCpuid(answers.into_iter().collect())
    }

    /// All answers, by leaf and subleaf.
    pub fn answers(&self) -> impl Iterator<Item = ((u32, u32), [u32; 4])> {
        self.0.iter().map(|(place, answer)| (*place, *answer))
    }

    /// One answer: EAX, EBX, ECX, EDX.
    #[must_use]
    pub fn get(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.0.get(&(leaf, subleaf)).copied().unwrap_or_default()
    }

    /// The vendor's twelve letters.
    #[must_use]
    pub fn vendor(&self) -> [u8; 12] {
        let [_, ebx, ecx, edx] = self.get(0, 0);
        let mut out = [0; 12];
        for (at, word) in [ebx, edx, ecx].into_iter().enumerate() {
            out[at * 4..at * 4 + 4].copy_from_slice(&word.to_le_bytes());
        }
        out
    }
}
