"""``kcache inspect --report``: a run as one page that needs nothing else, to keep or to send to somebody.

The recording is untrusted: every string goes through the template's escaping, numbers are made here, and the page's
own policy lets a browser load nothing and run nothing but the page's one script.
"""
