use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::timeout;

use super::{FRAME_LEN_MAX, Message};
use crate::{Error, Result};

/// The receiving half of a link.
#[derive(Debug)]
pub struct LinkReader<S> {
    stream: ReadHalf<S>,
    buffer: Vec<u8>,
}

/// The sending half of a link.
#[derive(Debug)]
pub struct LinkWriter<S> {
    stream: WriteHalf<S>,
}

/// Makes a link of a connection that has been taken over.
///
/// `received` is what has been read of it already.
pub fn split<S: AsyncRead + AsyncWrite>(
    stream: S,
    received: &[u8],
) -> (LinkReader<S>, LinkWriter<S>) {
    let (reader, writer) = tokio::io::split(stream);
    (LinkReader { stream: reader, buffer: received.to_vec() }, LinkWriter { stream: writer })
}

impl<S: AsyncRead + AsyncWrite> LinkReader<S> {
    /// The next message. Safe to drop while waiting: a partly received frame is kept.
    ///
    /// # Errors
    /// The connection ended, the frame is longer than [`FRAME_LEN_MAX`], or it is no message.
    pub async fn receive(&mut self) -> Result<Message> {
        loop {
            if let Some(message) = self.take_frame()? {
                return Ok(message);
            }
            let count = self
                .stream
                .read_buf(&mut self.buffer)
                .await
                .map_err(|e| Error::failed(format!("link: {e}")))?;
            if count == 0 {
                return Err(Error::failed("link: closed by the other side"));
            }
        }
    }

    /// The next message, within a deadline.
    ///
    /// # Errors
    /// As [`receive`](Self::receive), or nothing came in time.
    pub async fn receive_within(&mut self, limit: Duration) -> Result<Message> {
        match timeout(limit, self.receive()).await {
            Ok(result) => result,
            Err(_) => Err(Error::failed(format!("link: no message for {limit:?}"))),
        }
    }

    fn take_frame(&mut self) -> Result<Option<Message>> {
        let Some((head, rest)) = self.buffer.split_first_chunk::<4>() else { return Ok(None) };
        let len = u32::from_be_bytes(*head);
        if len > FRAME_LEN_MAX {
            return Err(Error::failed(format!(
                "link: a frame of {len} bytes; the other side does \
                 not speak this protocol"
            )));
        }
        let Some(frame) = rest.get(..len as usize) else { return Ok(None) };
        let message = serde_json::from_slice(frame)
            .map_err(|e| Error::failed(format!("link: not a message: {e}")))?;
        self.buffer.drain(..4 + len as usize);
        Ok(Some(message))
    }
}

impl<S: AsyncRead + AsyncWrite> LinkWriter<S> {
    /// Sends a message, within a deadline. After an error, a missed deadline included, the link
    /// is of no more use: part of a frame may have been sent.
    ///
    /// # Errors
    /// The connection is gone, or took longer than `limit`.
    pub async fn send(&mut self, message: &Message, limit: Duration) -> Result<()> {
        let mut frame = vec![0; 4];
        serde_json::to_writer(&mut frame, message)
            .map_err(|e| Error::failed(format!("link: {e}")))?;
        let len = u32::try_from(frame.len() - 4).unwrap_or(u32::MAX);
        if len > FRAME_LEN_MAX {
            return Err(Error::failed(format!("link: a message of {len} bytes is too long")));
        }
        frame[..4].copy_from_slice(&len.to_be_bytes());
        let send = async {
            self.stream.write_all(&frame).await?;
            // TLS keeps what it has taken until then.
            self.stream.flush().await
        };
        match timeout(limit, send).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(Error::failed(format!("link: {e}"))),
            Err(_) => {
                Err(Error::failed(format!("link: the other side takes no data for {limit:?}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Epoch;

    #[tokio::test]
    async fn a_message_survives_every_split() {
        let message = Message::Cut { epoch: Epoch(7), without: vec![1] };
        let mut wire = Vec::new();
        wire.extend_from_slice(&[0; 4]);
        serde_json::to_writer(&mut wire, &message).unwrap();
        let len = (wire.len() - 4) as u32;
        wire[..4].copy_from_slice(&len.to_be_bytes());
        for cut in 0..=wire.len() {
            let (near, mut far) = tokio::io::duplex(4096);
            let (mut reader, _writer) = split(near, &[]);
            far.write_all(&wire[..cut]).await.unwrap();
            // A receiver that gives up in the middle loses nothing.
            let early = tokio::select! {
                biased;
                m = reader.receive() => Some(m.unwrap()),
                () = tokio::task::yield_now() => None,
            };
            far.write_all(&wire[cut..]).await.unwrap();
            let got = match early {
                Some(message) => message,
                None => reader.receive().await.unwrap(),
            };
            assert_eq!(got, message, "split at {cut}");
        }
    }

    #[tokio::test]
    async fn an_oversized_frame_is_an_error() {
        let (near, mut far) = tokio::io::duplex(64);
        let (mut reader, _writer) = split(near, &[]);
        far.write_all(&(FRAME_LEN_MAX + 1).to_be_bytes()).await.unwrap();
        assert!(reader.receive().await.is_err());
    }

    #[tokio::test]
    async fn garbage_and_unknown_messages_are_errors() {
        for body in [&b"\xff\xfe"[..], b"{}", b"{\"type\":\"nonsense\"}", b"[1,2]"] {
            let (near, mut far) = tokio::io::duplex(64);
            let (mut reader, _writer) = split(near, &[]);
            far.write_all(&(body.len() as u32).to_be_bytes()).await.unwrap();
            far.write_all(body).await.unwrap();
            assert!(reader.receive().await.is_err(), "{body:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_link_that_takes_no_data_ends_the_wait() {
        let (near, _far) = tokio::io::duplex(4);
        let (_reader, mut writer) = split(near, &[]);
        let sent = writer.send(&Message::Heartbeat, Duration::from_secs(5)).await;
        assert!(sent.unwrap_err().to_string().contains("takes no data"));
    }
}
