/* The upstream of every measure: answers each request with bytes that were prepared beforehand.
 *
 * In C because it shares a core with the load generator and has to be several times cheaper than
 * the cheapest proxy measured (nginx), or the measure would be of it.
 *
 *     upstream PORT FRAMES INTERVAL_MS
 *
 * FRAMES is a file of frames, each behind its length (4 bytes, little-endian). The first frame is
 * written when a request is complete, each further one INTERVAL_MS later than the one before it.
 * A frame is wire bytes: head, chunk framing and all, one write(2) each. Connections are kept.
 * On a client that does not read, frames fall due and follow when it does: none is dropped.
 *
 * Requests need a Content-Length or none; bodies are read and forgotten. Exits at SIGTERM. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum { MAX_FDS = 20000, HEAD_BYTES = 16384, MAX_INTERVAL_MS = 10000 };

struct connection {
    char head[HEAD_BYTES]; /* the request so far, until its head is whole */
    size_t head_length;
    long long body_left;
    int reading_body;
    int frame;     /* the next frame to write, or -1 between requests */
    size_t offset; /* how much of it is written */
    int due;       /* how many frames may be written by now */
    int phase;     /* the millisecond of the interval at which this one's frames fall due */
    int previous, next, listed; /* the list of its phase */
    int wants_write;
};

static struct connection *connections[MAX_FDS];
static int phase_heads[MAX_INTERVAL_MS];
static char *frames[65536];
static uint32_t frame_lengths[65536];
static int frame_count, interval_ms, epoll_fd, next_phase;
static char sink[1 << 20];

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void load_frames(const char *path) {
    FILE *file = fopen(path, "rb");
    uint32_t length;
    if (!file) die(path);
    while (fread(&length, 4, 1, file) == 1) {
        if (frame_count == 65536 || !(frames[frame_count] = malloc(length)) ||
            fread(frames[frame_count], 1, length, file) != length)
            die("frames");
        frame_lengths[frame_count++] = length;
    }
    fclose(file);
    if (!frame_count) die("no frames");
}

static void unlist(int fd) {
    struct connection *c = connections[fd];
    if (!c->listed) return;
    if (c->previous >= 0) connections[c->previous]->next = c->next;
    else phase_heads[c->phase] = c->next;
    if (c->next >= 0) connections[c->next]->previous = c->previous;
    c->listed = 0;
}

static void list(int fd) {
    struct connection *c = connections[fd];
    c->phase = next_phase++ % interval_ms;
    c->previous = -1;
    c->next = phase_heads[c->phase];
    if (c->next >= 0) connections[c->next]->previous = fd;
    phase_heads[c->phase] = fd;
    c->listed = 1;
}

static void end(int fd) {
    unlist(fd);
    free(connections[fd]);
    connections[fd] = NULL;
    close(fd);
}

static void watch(int fd, int wants_write) {
    struct connection *c = connections[fd];
    if (c->wants_write == wants_write) return;
    c->wants_write = wants_write;
    struct epoll_event event = {EPOLLIN | (wants_write ? EPOLLOUT : 0), {.fd = fd}};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, fd, &event);
}

/* Write what is due. Returns 0 if the connection is gone. */
static int answer(int fd) {
    struct connection *c = connections[fd];
    while (c->frame >= 0 && c->frame < c->due) {
        size_t left = frame_lengths[c->frame] - c->offset;
        ssize_t sent = send(fd, frames[c->frame] + c->offset, left, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EAGAIN) {
                watch(fd, 1);
                return 1;
            }
            end(fd);
            return 0;
        }
        c->offset += sent;
        if ((size_t)sent < left) continue;
        c->offset = 0;
        if (++c->frame == frame_count) {
            c->frame = -1;
            unlist(fd);
        }
    }
    watch(fd, 0);
    return 1;
}

static int begin_answer(int fd) {
    struct connection *c = connections[fd];
    c->frame = 0;
    c->due = 1;
    if (frame_count > 1) list(fd);
    return answer(fd);
}

static void take(int fd) {
    struct connection *c = connections[fd];
    for (;;) {
        char *into = c->reading_body ? sink : c->head + c->head_length;
        size_t room = c->reading_body ? sizeof sink : HEAD_BYTES - 1 - c->head_length;
        ssize_t got = recv(fd, into, room, 0);
        if (got < 0 && errno == EAGAIN) return;
        if (got <= 0) {
            end(fd);
            return;
        }
        if (c->reading_body) {
            c->body_left -= got;
        } else {
            c->head_length += got;
            c->head[c->head_length] = 0;
            char *head_end = strstr(c->head, "\r\n\r\n");
            if (!head_end) {
                if (c->head_length == HEAD_BYTES - 1) {
                    end(fd);
                    return;
                }
                continue;
            }
            *head_end = 0;
            char *length = strcasestr(c->head, "\r\ncontent-length:");
            c->body_left = length ? atoll(length + 17) : 0;
            c->body_left -= c->head_length - (head_end + 4 - c->head);
            c->reading_body = 1;
        }
        if (c->body_left < 0 || (c->body_left == 0 && c->frame >= 0)) {
            end(fd); /* a pipelined request: no proxy measured here sends one */
            return;
        }
        if (c->body_left == 0) {
            c->reading_body = 0;
            c->head_length = 0;
            if (!begin_answer(fd)) return;
        }
        if ((size_t)got < room) return;
    }
}

static void greet(int listener) {
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        if (fd >= MAX_FDS || !(connections[fd] = calloc(1, sizeof(struct connection)))) {
            close(fd);
            continue;
        }
        connections[fd]->frame = -1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct epoll_event event = {EPOLLIN, {.fd = fd}};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
    }
}

static void pass_time(int timer) {
    static uint64_t now_ms;
    uint64_t passed;
    if (read(timer, &passed, sizeof passed) != sizeof passed) return;
    while (passed--) {
        int fd = phase_heads[++now_ms % interval_ms];
        while (fd >= 0) {
            int following = connections[fd]->next;
            if (connections[fd]->due < frame_count) connections[fd]->due++;
            answer(fd);
            fd = following;
        }
    }
}

int main(int count, char **words) {
    if (count != 4) {
        fprintf(stderr, "usage: upstream PORT FRAMES INTERVAL_MS\n");
        return 2;
    }
    load_frames(words[2]);
    interval_ms = atoi(words[3]);
    if (interval_ms < 1 || interval_ms > MAX_INTERVAL_MS) interval_ms = 1;
    memset(phase_heads, -1, sizeof phase_heads);
    struct rlimit files = {MAX_FDS, MAX_FDS};
    setrlimit(RLIMIT_NOFILE, &files);

    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(words[1]))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096))
        die("listen");
    epoll_fd = epoll_create1(0);
    struct epoll_event event = {EPOLLIN, {.fd = listener}};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event);
    int timer = -1;
    if (frame_count > 1) {
        timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
        struct itimerspec each_ms = {{0, 1000000}, {0, 1000000}};
        timerfd_settime(timer, 0, &each_ms, NULL);
        event.data.fd = timer;
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer, &event);
    }
    for (;;) {
        struct epoll_event events[512];
        int ready = epoll_wait(epoll_fd, events, 512, -1);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) greet(listener);
            else if (fd == timer) pass_time(timer);
            else if (connections[fd] && events[i].events & EPOLLOUT && !answer(fd)) continue;
            else if (connections[fd] && events[i].events & ~EPOLLOUT) take(fd);
        }
    }
}
