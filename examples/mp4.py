"""Frames of a video file by their numbers, exact in files as cameras and editors write them (needs PyAV).

The plain way is to decode the whole file and to count. Here a frame's number is its rank among the
presentation times of all packets, which stays exact with B-frames and edit lists; a read decodes from the
keyframe before, or goes on with the decoder of the last read. Frames come as a player shows them: upright,
RGB, and without what an edit list cuts away. A damaged frame is an error, never a wrong picture.
"""
import itertools
import os

import numpy as np

from data import check, reading

class Mp4:
    """`Mp4(file, n)[np.array([3, 5])]` -> uint8 (2, H, W, 3); n is the number of frames, where it is known.
    After a fork the parent's decoder stays in `last`, unused: to close it would be to wait for its threads,
    which are not here."""
    last = {}  # process id -> (the Mp4 read last, time of its last frame, decoder), while no thread reads it

    def __init__(self, file, frames=None):
        self.file, self.frames, self.times = file, frames, None
        with reading(file), self._open() as container:
            stream = container.streams.video[0]
            self.shape, self.tick = (frames, stream.height, stream.width, 3), float(stream.time_base)
            aspect = stream.sample_aspect_ratio or 1
        check(0.98 < aspect < 1.02,
              f"{file} has pixels {float(aspect):.3g} times as wide as high: scale it to square ones")

    def _open(self):
        import av  # not above, so that the sentence for who lacks it names the file
        return av.open(self.file, metadata_errors="replace")  # tags may be written in any encoding

    def index(self):
        """Fills `times`, the presentation times of the frames that a player shows, and `keys`, those of all
        keyframes: an edit list may discard a keyframe and show the frames that follow it."""
        if self.times is None:
            with reading(self.file), self._open() as container:
                table = [(p.pts, p.is_keyframe, p.is_discard) for p in container.demux(video=0)]
                times, is_key, is_discarded = np.array(sorted(table[:-1])).T  # the last one has no time
                self.keys, self.times = times[is_key == 1], times[is_discarded == 0]
        n = self.times.size
        check(self.frames in (None, n),
              f"{self.file} has {n} frames for {self.frames} states: fetch that shard again")
        return self

    def check_times(self, hz):
        """There are as many frames as states, hz of them a second at any time: a camera may be slow now and
        fast then."""
        times = self.index().times
        seconds = (times - times[0]) * self.tick
        late = seconds * hz - np.arange(times.size)  # in frames
        check(np.ptp(late) < 0.02 * times.size + 0.5, f"{self.file} plays {times.size} frames in "
              f"{seconds[-1]:.4g} s, not all at hz = {hz:g}: correct metadata.json, or write it again")

    def __getitem__(self, numbers):
        want, here, found = self.index().times[numbers], os.getpid(), []
        with reading(self.file, f"does not decode at frames {numbers[0]}..{numbers[-1]}"):
            key = self.keys[self.keys <= want[0]][-1]
            video, last, frames = Mp4.last.pop(here, (None, None, None))
            if video is not self or not key <= last < want[0]:
                frames = self._decode(key)
            for frame in frames:
                if frame.pts in want:
                    # (frame.side_data would tie the frame to itself: freed late, after a fork, it hangs.)
                    pixels = frame.to_ndarray(format="rgb24")
                    found.append(np.rot90(pixels, frame.rotation // 90))
                if frame.pts >= want[-1]:
                    break
            if len(found) < want.size:
                raise ValueError(f"only {len(found)} of {want.size} frames come")
            Mp4.last[here] = self, frame.pts, frames
            return np.stack(found)

    def _decode(self, key):
        """Yields the frames from the keyframe at time `key` on, in order of presentation."""
        from av.video.frame import PictureType
        with self._open() as container:
            # 1. Seek to that keyframe. Files are indexed in decoding order, so that among short groups of
            #    pictures this can land on a later one; then the keyframe before is tried.
            for start in self.keys[self.keys <= key][::-1]:
                container.seek(int(start), stream=container.streams.video[0])
                packets = container.demux(video=0)
                first = next(packets)
                if first.pts <= key:
                    break
            # 2. Decode. A decoder marks one frame as damaged, but all that are predicted from it are wrong,
            #    so none is given out after it. B-frames are predicted from a later frame, too: they wait
            #    until that frame has come. There are at most 16 of them in a row.
            waiting = []
            for packet in itertools.chain([first], packets):
                for frame in packet.decode():
                    if frame.is_corrupt and frame.pts >= key:
                        number = np.searchsorted(self.times, frame.pts)
                        raise ValueError(f"frame {number} is damaged, and with it all from its keyframe on")
                    waiting.append(frame)
                    if frame.pict_type != PictureType.B or len(waiting) > 16:
                        yield from waiting
                        waiting = []
            yield from waiting
