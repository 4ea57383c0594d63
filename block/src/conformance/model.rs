//! Random operations on a device and on plain memory.

use super::space::check_status;
use super::*;

const SIZE: u64 = 1_000_003;
const LEN_MAX: u64 = 150_000;

pub(super) async fn random_operations_agree_with_the_model<
    M: AsyncFn(u64) -> Arc<dyn BlockDevice>,
>(
    subject: &Subject<M>,
) -> Outcome {
    let device = subject.device(SIZE).await?;
    let content = read(&*device, 0, device.size() as usize).await?;
    let mut run = Run { device, content, random: Random(subject.options.seed), step: 0 };
    for _ in 0..subject.options.operations {
        run.step += 1;
        run.step(&subject.options)
            .await
            .map_err(|detail| format!("seed {}: {detail}", subject.options.seed))?;
    }
    expect_content(&*run.device, &run.content, "all random operations").await?;
    check_status(&*run.device, 1 << 30).await
}

struct Run {
    device: Arc<dyn BlockDevice>,
    content: Vec<u8>,
    random: Random,
    step: u32,
}

impl Run {
    async fn step(&mut self, options: &Options) -> Outcome {
        let (offset, len) = self.range();
        let step = self.step;
        match self.random.below(100) {
            0..40 => self.write(offset, len).await,
            40..60 => {
                let expected = &self.content[offset as usize..][..len as usize];
                let after = format!("step {step}");
                expect_range(&*self.device, offset, expected, &after).await
            }
            60..80 => self.zero(offset, len).await,
            80..86 => self.discard(offset, len).await,
            86..92 => check_status(&*self.device, len.max(4096)).await,
            92..95 => flush(&*self.device, FlushLevel::Process).await,
            95..97 => flush(&*self.device, FlushLevel::Durable).await,
            _ if options.can_truncate => self.truncate(options.size_unit.max(1)).await,
            _ => Ok(()),
        }
    }

    /// Short and long, aligned and not, often at the end; in multiples of the device's block,
    /// and not empty unless the device is.
    fn range(&mut self) -> (u64, u64) {
        let size = self.content.len() as u64;
        let block = block_size(&*self.device);
        let align = [1, 1, 512, 4096, 65_536][self.random.below(5) as usize].max(block);
        let offset = self.random.below(size) / align * align;
        let bound = [10, 1000, 10_000, LEN_MAX][self.random.below(4) as usize];
        let len = (self.random.below(bound) + 1).next_multiple_of(align);
        if self.random.below(10) == 0 {
            (offset, size - offset)
        } else {
            (offset, len.min(size - offset))
        }
    }

    async fn write(&mut self, offset: u64, len: u64) -> Outcome {
        let data = pattern(self.random.next(), len as usize);
        let fua = self.random.below(8) == 0;
        write_flags(&*self.device, offset, &data, WriteFlags { fua }).await?;
        self.content[offset as usize..][..len as usize].copy_from_slice(&data);
        Ok(())
    }

    async fn zero(&mut self, offset: u64, len: u64) -> Outcome {
        let flags = ZeroFlags { may_unmap: self.random.flag(), ..ZeroFlags::default() };
        zero(&*self.device, offset, len, flags).await?;
        self.content[offset as usize..][..len as usize].fill(0);
        Ok(())
    }

    async fn discard(&mut self, offset: u64, len: u64) -> Outcome {
        let result = self.device.discard(offset, len).await;
        result.map_err(|error| format!("a discard failed: {error}"))?;
        let found = read(&*self.device, offset, len as usize).await?;
        let old = &mut self.content[offset as usize..][..len as usize];
        for (at, (old, found)) in old.iter_mut().zip(found).enumerate() {
            ensure!(
                found == *old || found == 0,
                "step {}: after a discard the byte at {} is neither old nor zero",
                self.step,
                offset + at as u64
            );
            *old = found;
        }
        Ok(())
    }

    async fn truncate(&mut self, unit: u64) -> Outcome {
        let size = (SIZE / 2 + self.random.below(SIZE)).next_multiple_of(unit);
        let result = self.device.truncate(size).await;
        result.map_err(|error| format!("truncate to {size} failed: {error}"))?;
        self.content.resize(size as usize, 0);
        let now = self.device.size();
        ensure!(now == size, "step {}: the size is {now}, not {size}", self.step);
        Ok(())
    }
}
